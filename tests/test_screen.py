"""What is shown of the phases, and what a worker tells of them."""

import io
import multiprocessing
import re

import pytest

from m2mkd import screen
from m2mkd.screen import RemoteScreen, Screen


class Terminal(io.StringIO):
    """What stands on a terminal after all that was written to it."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        screen: list[list[str]] = []
        row = column = 0
        for part in re.findall(r"\x1b\[A|.|\n", self.getvalue().replace("\r", "\x00")):
            if part == "\x1b[A":
                row -= 1
            elif part == "\n":
                row, column = row + 1, 0
            elif part == "\x00":
                column = 0
            else:
                screen += [[] for _ in range(row + 1 - len(screen))]
                screen[row] += " " * (column + 1 - len(screen[row]))
                screen[row][column] = part
                column += 1
        return ["".join(line) for line in screen]


class TestScreen:
    def test_a_log_file_gets_a_line_of_progress_now_and_then(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        clock = iter([0.0, 10.0, 31.0, 40.0])
        monkeypatch.setattr(screen.time, "monotonic", lambda: next(clock))
        shown = Screen()
        for step in (0, 500, 1500, 1600):
            shown.advance("arm kd", step, 4000, {"loss": "0.5", "accuracy": "0.9"})
        shown.finish("arm kd")
        assert capsys.readouterr().out == "arm kd: step 1,500 of 4,000, loss 0.5, accuracy 0.9\n"

    def test_a_terminal_gets_a_bar_for_each_phase(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr("sys.stderr.isatty", lambda: True)
        shown = Screen()
        shown.advance("meta", 0, 10, {})
        shown.advance("arm e2e", 3, 20, {"loss": "0.5"})
        shown.say("a line")
        shown.finish("meta")
        shown.finish_all()
        printed = capsys.readouterr()
        assert printed.out == "a line\n"
        assert "meta" in printed.err and "arm e2e" in printed.err and "3/20" in printed.err

    def test_a_bar_that_ends_leaves_nothing_of_the_others_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setattr("sys.stdout", terminal)
        shown = Screen()
        for name in ("meta", "arm e2e", "arm kd"):
            shown.advance(name, 1, 10, {"loss": "0.5"})
        for name in ("meta", "arm e2e"):
            shown.advance(name, 10, 10, {"loss": "0.4"})
            shown.finish(name)
            shown.say(f"{name}: done")
        shown.advance("pairs", 1, 10, {})
        shown.finish_all()
        shown.say("END")
        found = [re.sub(r" *\d+%.*[\]s]$", "", line.rstrip()) for line in terminal.lines() if line.strip()]
        assert found == ["meta:", "meta: done", "arm e2e:", "arm e2e: done", "arm kd:", "pairs:", "END"]


class TestRemoteScreen:
    def test_it_tells_the_other_process_but_not_of_every_step(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        remote = RemoteScreen(theirs)
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
