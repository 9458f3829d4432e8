"""One writer: who makes an artifact is noted beside it, so that no second process does."""

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil
from accelerate import PartialState

from m2mkd.errors import RunError
from m2mkd.experiment.run_folder import RunFolder, lock_file
from m2mkd.files import explained_write_errors


# Time in which a lock that was just created gets its content.
_SECONDS_TO_WRITE = 2.0


@dataclass(frozen=True)
class Writer:
    """
    A process that makes artifacts.

    Args:
        host (`str`)
        pid (`int`)
        started (`float`): Seconds since the epoch. It tells a process from a later one with the same `pid`.
        job (`str`, *optional*): Id of its Slurm job, which a requeued job keeps on another host.
        restarts (`int`): How often that job has been requeued.
    """

    host: str
    pid: int
    started: float
    job: str | None
    restarts: int

    @classmethod
    def here(cls) -> "Writer":
        """This process."""
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        return cls(socket.gethostname(), os.getpid(), psutil.Process().create_time(), job, restarts)

    def is_gone(self, here: "Writer") -> bool:
        """Whether it has ended, as far as the process `here` can know."""
        if self.job is not None and self.job == here.job and self.restarts < here.restarts:
            return True
        if self.host != here.host:
            return False
        try:
            process = psutil.Process(self.pid)
            # the second allows for corrections of the clock
            return process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 1
        except psutil.NoSuchProcess:
            return True

    def in_words(self) -> str:
        """Name it in a message."""
        day = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, started {day}"


@contextmanager
def one_writer(artifacts: Iterable[Path], take_over: bool = False) -> Iterator[None]:
    """
    Context manager in which this process is the only one that makes some artifacts. Each has its own lock, so that
    runs that share out the pairs, arms or seeds of one folder, on any machines, hold only their own parts. Of several
    processes that train together, the main one holds the locks; workers are covered by the process that started them.
    Readers need no lock.

    The lock of a process that has ended is taken over: on this host, if the process is gone; on another, if it is an
    earlier start of this requeued Slurm job.

    Args:
        artifacts (`Iterable[Path]`): Folders of the artifacts.
        take_over (`bool`, *optional*, defaults to `False`): Also take over locks of other hosts, and damaged ones.

    Raises:
        `RunError`: another process makes one of them. Then none is held.
    """
    here, held = Writer.here(), []
    try:
        for artifact in artifacts if PartialState().is_main_process else ():
            _take(artifact, here, take_over)
            held.append(lock_file(artifact))
        yield
    finally:
        for lock in held:
            # unless another host took it over
            if _read(lock) == here:
                lock.unlink(missing_ok=True)


def other_writers(folder: RunFolder) -> list[Writer]:
    """The processes that make artifacts of a run now, without this one."""
    here = Writer.here()
    writers = {writer for lock in folder.locks() if (writer := _read(lock)) is not None}
    return [writer for writer in writers if writer != here and not writer.is_gone(here)]


def _take(artifact: Path, here: Writer, take_over: bool) -> None:
    lock = lock_file(artifact)
    while not _created(lock, here):
        writer = _read_soon(lock)
        if writer is None and not lock.exists():
            continue
        may_take = take_over if writer is None or writer.host != here.host else False
        if not may_take and (writer is None or not writer.is_gone(here)):
            raise RunError(_refusal(artifact, lock, writer, here))
        _remove(lock, writer)


def _refusal(artifact: Path, lock: Path, writer: Writer | None, here: Writer) -> str:
    if writer is None:
        return f"{lock} is damaged. If no other run makes {artifact} now, add --take-over."
    lost = f" If that process has ended, add --take-over: {here.host} cannot know." if writer.host != here.host else ""
    return (
        f"{artifact} is being made by {writer.in_words()}. Two runs cannot write the same artifact. Wait until it "
        f"ends, or stop it; then run the same command again.{lost}"
    )


def _created(lock: Path, writer: Writer) -> bool:
    with explained_write_errors(lock):
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with lock.open("x") as file:
                json.dump(asdict(writer), file)
        except FileExistsError:
            return False
        except OSError:
            # an empty lock, left by a full disk, would stop the next start
            lock.unlink(missing_ok=True)
            raise
    return True


def _read(lock: Path) -> Writer | None:
    """The writer that a lock names; `None` if there is no lock or it is damaged."""
    try:
        return Writer(**json.loads(lock.read_text()))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _read_soon(lock: Path) -> Writer | None:
    end = time.monotonic() + _SECONDS_TO_WRITE
    while (writer := _read(lock)) is None and lock.exists() and time.monotonic() < end:
        time.sleep(0.02)
    return writer


def _remove(lock: Path, writer: Writer | None) -> None:
    """Remove the lock of a process that has ended, but not one that another process has put there since."""
    aside = lock.with_name(f"{lock.name}.{socket.gethostname()}.{os.getpid()}")
    with suppress(FileNotFoundError):
        os.rename(lock, aside)
        found = _read(aside)
        if found is not None and found != writer:
            _created(lock, found)
        aside.unlink()
