"""What is shown of the phases, and what a worker tells of them."""

import multiprocessing

import pytest

from m2mkd.trainer import screen
from m2mkd.trainer.screen import RemoteScreen, Screen


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
