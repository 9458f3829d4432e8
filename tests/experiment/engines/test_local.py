"""Which task runs when and where, and what becomes of the others when one fails."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from schedule_work import fail, wait_for, work

from m2mkd.errors import RunError
from m2mkd.experiment.engines.local import run_tasks
from m2mkd.experiment.engines.task import Task, WorkerTraceback


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    # one that ended and that nobody has asked about yet
    return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z" if Path("/proc").is_dir() else True


@pytest.fixture
def forks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that need not import torch again. The tests without this fixture start them as a run does."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method: context)


class TestInOneProcess:
    def test_the_first_task_that_waits_for_nothing_is_next(self) -> None:
        order: list[str] = []
        tasks = [
            Task("c", ("c",), after=("a", "b")),
            Task("b", ("b",), after=("a",)),
            Task("d", ("d",)),
            Task("a", ("a",)),
        ]
        run_tasks(tasks, lambda screen, name: order.append(name))
        assert order == ["d", "a", "b", "c"]

    def test_a_task_that_is_not_in_the_list_is_finished(self) -> None:
        order: list[str] = []
        run_tasks([Task("b", ("b",), after=("a",))], lambda screen, name: order.append(name), processes=4)
        assert order == ["b"]

    def test_tasks_that_wait_for_each_other_are_named(self) -> None:
        with pytest.raises(ValueError, match=r"\['a', 'b'\] wait for each other"):
            run_tasks([Task("a", (), after=("b",)), Task("b", (), after=("a",))], lambda screen: None)

    def test_they_are_named_before_anything_is_done(self) -> None:
        order: list[str] = []
        tasks = [Task("c", ("c",)), Task("a", ("a",), after=("b",)), Task("b", ("b",), after=("a",))]
        with pytest.raises(ValueError, match=r"\['a', 'b'\] wait for each other"):
            run_tasks(tasks, lambda screen, name: order.append(name))
        assert order == []

    def test_an_error_stops_the_rest(self, tmp_path: Path) -> None:
        (tmp_path / "long").touch()
        with pytest.raises(RunError, match="bad: no room"):
            run_tasks([Task("bad", (tmp_path, "bad")), Task("next", (tmp_path, "next"))], fail)
        assert not (tmp_path / "next").exists()


class TestSideBySide:
    @pytest.mark.usefixtures("forks")
    def test_of_those_that_wait_for_nothing_the_first_is_next(self, tmp_path: Path) -> None:
        """One worker is kept busy until the other has done the rest."""
        tasks = [
            Task("c", (tmp_path, "c"), after=("a",)),
            Task("busy", (tmp_path, "busy", "b")),
            Task("b", (tmp_path, "b", "c"), after=("a",)),
            Task("a", (tmp_path, "a", "busy.begun")),
        ]
        run_tasks(tasks, work, processes=2)
        times = {task.name: (tmp_path / task.name).stat().st_mtime_ns for task in tasks}
        assert sorted(times, key=times.get) == ["a", "c", "b", "busy"]

    def test_tasks_overlap_share_the_threads_and_keep_their_order(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
        # each of the first two ends only after the other has begun; the third needs both
        tasks = [
            Task("third", (tmp_path, "third"), after=("first", "second")),
            Task("first", (tmp_path, "first", "second.begun")),
            Task("second", (tmp_path, "second", "first.begun")),
        ]
        run_tasks(tasks, work, processes=2)
        found = {name: (tmp_path / name).read_text().split() for name in ("first", "second", "third")}
        assert found["first"][0] != found["second"][0]
        assert found["third"][0] in (found["first"][0], found["second"][0])
        assert {threads for _, threads in found.values()} == {"3"}
        assert (tmp_path / "third").stat().st_mtime_ns >= (tmp_path / "second").stat().st_mtime_ns
        assert capsys.readouterr().out.splitlines()[-1] == "third begins"
        assert not any(is_alive(int(process)) for process, _ in found.values())

    @pytest.mark.usefixtures("forks")
    @pytest.mark.parametrize(
        "name, error, message",
        [
            ("bad", RunError, "^bad: no room$"),
            ("odd", RuntimeError, "^CannotBeSent: 3 apples$"),
            (
                "killed",
                RunError,
                "killed was killed by SIGKILL.* 2 phases at once, set `processes` to a smaller number",
            ),
        ],
    )
    def test_an_error_arrives_as_it_is_and_the_other_worker_is_ended(
        self, tmp_path: Path, name: str, error: type[Exception], message: str
    ) -> None:
        tasks = [Task("long", (tmp_path, "long")), Task(name, (tmp_path, name)), Task("next", (tmp_path, "next"))]
        with pytest.raises(error, match=message) as caught:
            run_tasks(tasks, fail, processes=2)
        assert name == "killed" or "schedule_work.py" in str(caught.value.__cause__)
        assert name == "killed" or isinstance(caught.value.__cause__, WorkerTraceback)
        assert not is_alive(int((tmp_path / "long").read_text()))
        assert not (tmp_path / "next").exists()

    @pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
    def test_workers_end_with_the_process_that_started_them(self, tmp_path: Path, how: signal.Signals) -> None:
        script = tmp_path / "script.py"
        script.write_text(
            "import signal\n"
            "from pathlib import Path\n"
            "from schedule_work import sleep\n"
            "from m2mkd.experiment.engines.local import run_tasks\n"
            "from m2mkd.experiment.engines.task import Task\n"
            "if __name__ == '__main__':\n"
            # a process that was started in the background of a shell ignores it
            "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
            f"    folder = Path({str(tmp_path)!r})\n"
            "    run_tasks([Task(name, (folder, name)) for name in ('a', 'b')], sleep, processes=2)\n"
        )
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        process = subprocess.Popen([sys.executable, str(script)], env={**os.environ, "PYTHONPATH": path})
        for name in ("a", "b"):
            wait_for(tmp_path / name)
        time.sleep(0.5)
        # with those that the workers have started
        workers = [int(process) for name in ("a", "b") for process in (tmp_path / name).read_text().split()]
        process.send_signal(how)
        process.wait(timeout=60)
        for _ in range(100):
            if not any(map(is_alive, workers)):
                return
            time.sleep(0.1)
        raise AssertionError("a worker outlived the process that started it")
