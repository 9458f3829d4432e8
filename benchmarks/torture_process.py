"""Commands of m2mkd in forked processes that can be killed, starved of disk and timed; and how their end is judged."""

import errno
import multiprocessing
import os
import random
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil


# An event of the file system is one of these audit events of Python on a path below the watched folder.
_FILE_EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.utime"}
_WAYS_OUT = [
    "add",
    "allow",
    "ask",
    "change",
    "check",
    "choose",
    "close",
    "convert",
    "copy",
    "cut",
    "delete",
    "distil",
    "download",
    "enlarge",
    "export",
    "fetch",
    "finish",
    "fix",
    "free",
    "get",
    "give",
    "install",
    "join",
    "keep",
    "leave",
    "lift",
    "log",
    "lower",
    "make",
    "move",
    "name",
    "pass",
    "put",
    "raise",
    "reduce",
    "remove",
    "rename",
    "repair",
    "replace",
    "resume",
    "run",
    "save",
    "see",
    "set",
    "split",
    "train",
    "try",
    "unpack",
    "unset",
    "use",
    "wait",
    "write",
]
_WAY_OUT = re.compile(
    rf"(?:^|[.:;,(]\s+|\b(?:or|and|must|to|can|only|instead|first)\s+)`?(?:{'|'.join(_WAYS_OUT)})\b",
    re.IGNORECASE | re.MULTILINE,
)
_RULE = re.compile(
    r"\b(?:must|should|needs?|use one of|only|there is no|not a|cannot|is missing|is damaged|greater|less|"
    r"at (?:least|most)|valid|input)\b",
    re.IGNORECASE,
)
_VALUE = re.compile(r"[`'\"/=\d:\[]|\w\.\w|no image file|imagefolder")
# what Python's own exceptions and libraries say, and no author of ours
_RAW = re.compile(
    r"\b(?:NoneType|object has no attribute|list index out of range|unhashable|unexpected keyword argument)"
)


@dataclass(frozen=True)
class Ending:
    """
    How a command ended.

    Args:
        code (`int`, *optional*): Exit status; negative: the signal that killed it; `None`: it did not end in time.
        said (`str`): What it wrote to the terminal.
    """

    code: int | None
    said: str

    @property
    def fault(self) -> str | None:
        """`"hang"`, `"traceback"`, `"crash"` or `"advice"`; `None`: it succeeded, or said what to do."""
        if self.code in (None, -signal.SIGXCPU, -signal.SIGKILL):
            return "hang"
        if "Traceback (most recent call last)" in self.said or re.search(
            r"^Exception ignored", self.said, re.MULTILINE
        ):
            return "traceback"
        if self.code < 0 or self.code > 2:
            return "crash"
        return None if self.code == 0 or is_good_advice(self.message) else "advice"

    @property
    def message(self) -> str:
        """What it says about its failure."""
        _, found, message = self.said.rpartition("Error: ")
        # click draws a box around a wrong option
        return message if found else re.sub(r"[│╭╮╰╯─]+", " ", self.said)


def is_good_advice(message: str) -> bool:
    """Whether a message names a value, and a rule or what to do, and is no text of an exception of Python."""
    return bool(
        _VALUE.search(message) and (_WAY_OUT.search(message) or _RULE.search(message)) and not _RAW.search(message)
    )


class Process:
    """
    A command of m2mkd in a process of its own, forked from this one so that nothing has to be imported again.

    Args:
        folder (`Path`): Its working directory. What it says is kept in `said.txt` beside it.
        arguments (`Sequence[str]`): The command and its options.
        watched (`str`): Folder in it whose file events are counted.
        on_event (`Callable`, *optional*): Called in the process before each event with its number, from 1, and its
            arguments.
    """

    def __init__(
        self,
        folder: Path,
        arguments: Sequence[str],
        watched: str = "run",
        on_event: Callable[[int, str, tuple[Any, ...]], None] | None = None,
        log: str | None = None,
        limits: Callable[[], None] | None = None,
    ):
        self._log = folder.with_name(f"{folder.name}.{log or 'said'}.txt")
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(folder, arguments, watched, on_event, limits)

    def _be(
        self,
        folder: Path,
        arguments: Sequence[str],
        watched: str,
        on_event: Callable[..., None] | None,
        limits: Callable[[], None] | None,
    ) -> None:
        code = 70
        try:
            os.setsid()
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.chdir(folder)
            if limits is not None:
                limits()
            # workers are forked too: nothing here has threads yet
            multiprocessing.get_context = lambda method=None: get_context("fork")
            if on_event is not None:
                _watch(str(folder.resolve() / watched), on_event)
            code = _call(arguments)
        except BaseException:  # noqa: BLE001 - a fork must not return into the code of its parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def end(self, seconds: float) -> Ending:
        """Wait for its end; after `seconds`, it is killed and counts as hanging."""
        limit = time.monotonic() + seconds
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found or time.monotonic() > limit:
                break
            time.sleep(0.005)
        if not found:
            self.kill()
            os.waitpid(self.pid, 0)
        code = os.waitstatus_to_exitcode(status) if found else None
        return Ending(code, self._log.read_text(errors="replace") if self._log.is_file() else "")

    def kill(self) -> None:
        """Kill the process itself; its workers must notice."""
        os.kill(self.pid, signal.SIGKILL)

    def kill_worker(self, rng: random.Random) -> bool:
        """Kill one of its worker processes. Returns whether there was one."""
        workers = psutil.Process(self.pid).children()
        if workers:
            rng.choice(workers).kill()
        return bool(workers)

    def left(self, seconds: float = 10.0) -> list[int]:
        """Processes of its session that are still there after `seconds`, killed now."""
        limit = time.monotonic() + seconds
        while (found := [pid for pid in psutil.pids() if _in_session(pid, self.pid)]) and time.monotonic() < limit:
            time.sleep(0.02)
        for pid in found:
            os.kill(pid, signal.SIGKILL)
        return found


def _in_session(pid: int, session: int) -> bool:
    try:
        return os.getsid(pid) == session and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


def _call(arguments: Sequence[str]) -> int:
    from m2mkd.cli import app

    try:
        app(list(arguments), prog_name="m2mkd")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _watch(folder: str, on_event: Callable[[int, str, tuple[Any, ...]], None]) -> None:
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _FILE_EVENTS or not isinstance(arguments[0], str | bytes | os.PathLike):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        if os.path.abspath(os.fsdecode(arguments[0])).startswith(folder):
            count += 1
            on_event(count, event, arguments)

    sys.addaudithook(hook)


def killed_at(number: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """A process that is killed before its event `number`."""

    def kill(count: int, event: str, arguments: tuple[Any, ...]) -> None:
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return kill


def disk_full_from(number: int) -> Callable[[int, str, tuple[Any, ...]], None]:
    """A process whose writes fail from its event `number` on, as on a full disk; files can still be removed."""

    def fail(count: int, event: str, arguments: tuple[Any, ...]) -> None:
        if count >= number and event in ("open", "os.mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(arguments[0]))

    return fail
