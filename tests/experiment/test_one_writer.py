"""Locks between real processes: one writer an artifact, and no lock that outlives its writer."""

import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import pytest

from m2mkd.errors import RunError
from m2mkd.experiment.one_writer import Writer, one_writer, other_writers
from m2mkd.experiment.run_folder import RunFolder, lock_file
from m2mkd.files import write_json


FORK = multiprocessing.get_context("fork")


def _hold(artifact: Path, connection: Connection, seconds: float = 60) -> None:
    with suppress(RunError), one_writer([artifact]):
        connection.send(os.getpid())
        time.sleep(seconds)


@contextmanager
def other_process(artifact: Path) -> Iterator[ForkProcess]:
    """A process that makes an artifact."""
    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=_hold, args=(artifact, theirs))
    process.start()
    assert ours.recv() == process.pid
    try:
        yield process
    finally:
        process.kill()
        process.join()


def note(artifact: Path, **changes: Any) -> None:
    """Leave the lock of a writer that differs from this process."""
    artifact.parent.mkdir(parents=True, exist_ok=True)
    write_json(lock_file(artifact), asdict(replace(Writer.here(), **changes)))


def test_a_second_process_is_refused_and_told_who_is_at_work(tmp_path: Path) -> None:
    artifact = tmp_path / "pairs" / "3"
    with other_process(artifact) as process:
        for take_over in (False, True):
            with (
                pytest.raises(RunError, match=rf"pairs/3 is being made by process {process.pid} on .*, started 2"),
                one_writer([tmp_path / "meta", artifact], take_over),
            ):
                pass
        assert other_writers(RunFolder(tmp_path, 0))[0].pid == process.pid
        assert not lock_file(tmp_path / "meta").exists()
        with one_writer([tmp_path / "pairs" / "2"]):
            assert len(list(RunFolder(tmp_path, 0).locks())) == 2


def test_a_lock_ends_with_its_writer_also_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), one_writer([tmp_path / "meta"]):
        assert lock_file(tmp_path / "meta").exists()
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("is_reaped", [True, False], ids=["gone", "zombie"])
def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, is_reaped: bool) -> None:
    artifact = tmp_path / "teacher"
    with other_process(artifact) as process:
        os.kill(process.pid, signal.SIGKILL)
        # waits for the end, and leaves the zombie to `join`
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        if is_reaped:
            process.join()
        assert lock_file(artifact).exists() and not other_writers(RunFolder(tmp_path, 0))
        with one_writer([artifact]):
            pass


def test_a_later_process_with_the_same_number_is_not_the_writer(tmp_path: Path) -> None:
    note(tmp_path / "meta", started=Writer.here().started - 3600)
    with one_writer([tmp_path / "meta"]):
        assert not other_writers(RunFolder(tmp_path, 0))


def test_a_lock_of_another_host_needs_take_over(tmp_path: Path) -> None:
    note(tmp_path / "meta", host="node7")
    with pytest.raises(RunError, match="on node7, .*add --take-over"), one_writer([tmp_path / "meta"]):
        pass
    assert [writer.host for writer in other_writers(RunFolder(tmp_path, 0))] == ["node7"]
    with one_writer([tmp_path / "meta"], take_over=True):
        assert not other_writers(RunFolder(tmp_path, 0))


def test_a_writer_that_was_taken_over_leaves_the_new_lock(tmp_path: Path) -> None:
    with one_writer([tmp_path / "meta"]):
        note(tmp_path / "meta", host="node7")
    assert lock_file(tmp_path / "meta").exists()


def test_a_damaged_lock_needs_take_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("m2mkd.experiment.one_writer._SECONDS_TO_WRITE", 0.1)
    lock_file(tmp_path / "meta").write_text('{"host"')
    with pytest.raises(RunError, match="damaged.*--take-over"), one_writer([tmp_path / "meta"]):
        pass
    with one_writer([tmp_path / "meta"], take_over=True):
        pass


def test_a_requeued_slurm_job_takes_over_its_own_lock_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for job, restarts in (("17", 1), ("16", 0)):
        note(tmp_path / "meta", host="node7", job=job, restarts=restarts)
        with pytest.raises(RunError, match="node7"), one_writer([tmp_path / "meta"]):
            pass
    note(tmp_path / "meta", host="node7", job="17", restarts=0)
    with one_writer([tmp_path / "meta"]):
        pass


def test_of_processes_that_start_together_on_a_lock_left_behind_one_gets_it(tmp_path: Path) -> None:
    note(tmp_path / "meta", host=socket.gethostname(), started=0.0)
    ours, theirs = FORK.Pipe()
    processes = [FORK.Process(target=_hold, args=(tmp_path / "meta", theirs, 3)) for _ in range(8)]
    for process in processes:
        process.start()
    theirs.close()
    for process in processes:
        process.join()
    winners = []
    with suppress(EOFError):
        while True:
            winners.append(ours.recv())
    assert len(winners) == 1 and not list(tmp_path.iterdir())
