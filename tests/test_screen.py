"""What is shown of the phases, and what a worker tells of them."""

import io
import multiprocessing
import re

import pytest

from m2mkd import screen
from m2mkd.screen import RemoteScreen, Screen, in_words


class Terminal(io.StringIO):
    """What stands on a terminal after all that was written to it."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        screen: list[list[str]] = []
        row = column = 0
        for part in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|.|\n", self.getvalue()):
            screen += [[] for _ in range(row + 1 - len(screen))]
            if part == "\x1b[1A":
                row -= 1
            elif part == "\x1b[2K":
                screen[row] = []
            elif part == "\n":
                row, column = row + 1, 0
            elif part == "\r":
                column = 0
            elif not part.startswith("\x1b"):
                screen[row] += " " * (column + 1 - len(screen[row]))
                screen[row][column] = part
                column += 1
        return [text for line in screen if (text := "".join(line).rstrip())]


def terminal_of(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 80 columns as standard output and standard error, from now on."""
    made = Terminal()
    monkeypatch.setattr("sys.stderr", made)
    monkeypatch.setattr("sys.stdout", made)
    monkeypatch.setattr(screen, "SECONDS_BETWEEN_REPORTS", 0.0)
    monkeypatch.setattr(screen.time, "monotonic", lambda: 0.0)
    for name, value in {"COLUMNS": "80", "LINES": "30", "TERM": "xterm"}.items():
        monkeypatch.setenv(name, value)
    return made


class TestScreen:
    def test_a_log_file_gets_a_line_of_progress_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = [0.0]
        monkeypatch.setattr(screen.time, "monotonic", lambda: clock[0])
        shown = Screen()
        for clock[0], step in ((0.0, 0), (10.0, 500), (40.0, 2000), (50.0, 2500)):
            shown.advance("arm kd", step, 16000, {"loss": "0.5", "accuracy": "0.9"})
        shown.finish("arm kd")
        assert capsys.readouterr().out.splitlines() == [
            "arm kd: step 2,000 of 16,000, loss 0.5, accuracy 0.9, 5 min left",
            "arm kd: 2,500 steps in 50 s, loss 0.5, accuracy 0.9",
        ]

    def test_a_terminal_gets_one_table_and_lines_above_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = terminal_of(monkeypatch)
        shown = Screen()
        shown.advance("[seed 0] meta", 0, 10, {})
        shown.advance("[seed 0] arm e2e", 3, 2000, {"loss": "0.512"})
        shown.advance("[seed 0] arm kd", 1, 2000, {"loss": "0.7", "accuracy": "0.9"})
        shown.say("a line")
        shown.finish("[seed 0] meta")
        shown.advance("[seed 0] arm e2e", 20, 2000, {"loss": "0.4"})
        lines = terminal.lines()
        assert lines[:2] == ["a line", "[seed 0] meta: 0 steps in 0 s"]
        assert lines[2].split() == ["Phase", "Step", "Loss", "Accuracy", "Left"]
        assert [re.sub("[━╸╺ ]+", " ", line) for line in lines[3:]] == [
            "[seed 0] arm e2e 20/2,000 0.4 0 s",
            "[seed 0] arm kd 1/2,000 0.7 0.9",
        ]
        assert all(len(line) <= 80 for line in lines)
        shown.finish_all()
        assert terminal.lines()[2:] == [
            "[seed 0] arm e2e: stopped at step 20 of 2,000, loss 0.4",
            "[seed 0] arm kd: stopped at step 1 of 2,000, loss 0.7, accuracy 0.9",
        ]

    def test_lines_stay_on_a_redirected_output(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal, file = terminal_of(monkeypatch), io.StringIO()
        monkeypatch.setattr("sys.stdout", file)
        shown = Screen()
        shown.advance("meta", 1, 10, {})
        shown.say("a line")
        shown.finish("meta")
        assert file.getvalue() == "a line\nmeta: 0 steps in 0 s\n" and not terminal.lines()

    @pytest.mark.parametrize("seconds, words", [(3.2, "3 s"), (89, "89 s"), (100, "2 min"), (6000, "1.7 h")])
    def test_durations_have_the_usual_unit(self, seconds: float, words: str) -> None:
        assert in_words(seconds) == words


class TestRemoteScreen:
    def test_it_tells_the_other_process_but_not_of_every_step(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        remote = RemoteScreen(theirs.send)
        remote.say("a line")
        for step in range(100):
            remote.advance("meta", step + 1, 100, {})
        remote.finish("meta")
        theirs.close()
        told = []
        while ours.poll():
            try:
                told.append(ours.recv())
            except EOFError:
                break
        assert told[0] == ("say", "a line") and told[-1] == ("finish", "meta")
        assert ("advance", "meta", 100, 100, {}) in told and len(told) < 50
