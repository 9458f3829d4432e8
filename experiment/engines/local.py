"""Runs tasks in an order that their dependencies allow, side by side in worker processes if asked to."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from tqdm import tqdm

from m2mkd.errors import RunError
from m2mkd.screen import RemoteScreen, Screen


@dataclass(frozen=True)
class Task:
    """
    Something to do once.

    Args:
        name (`str`): Unique among the tasks.
        arguments (`tuple`): What the work function is called with.
        after (`tuple[str, ...]`, *optional*): Tasks to be finished before. A name that none of the tasks has is taken
            for finished.
    """

    name: str
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()


Work = Callable[..., None]


class WorkerTraceback(Exception):
    """The cause of an error that was raised in a worker process: the traceback there, as text."""


def run_tasks(tasks: Sequence[Task], work: Work, processes: int = 1) -> None:
    """
    Do all tasks. Whenever a process is free, the first task of the list that waits for nothing is next.

    Args:
        tasks (`Sequence[Task]`)
        work (`Callable`): Called as `work(screen, *task.arguments)`. With several processes each gets a copy of it,
            made by pickle; what it keeps in itself stays in that process.
        processes (`int`, *optional*, defaults to 1): How many tasks to do at once. 1: in this process, with no worker.
            The threads of this process are shared out among the workers.

    Raises:
        `RunError`: a worker process was killed. An error of a task is raised here as well. In both cases the other
            workers are ended.
    """
    screen, order = Screen(), _Order(tasks)
    try:
        if processes > 1 and len(tasks) > 1:
            _side_by_side(order, work, min(processes, len(tasks)), screen)
            return
        while order.is_active():
            task = order.next_task()
            work(screen, *task.arguments)
            order.done(task.name)
    finally:
        screen.finish_all()


class _Order(TopologicalSorter[str]):
    """What can start when, of tasks given as a list."""

    def __init__(self, tasks: Sequence[Task]):
        self._tasks = {task.name: task for task in tasks}
        self._ready: set[str] = set()
        super().__init__({task.name: self._tasks.keys() & task.after for task in tasks})
        try:
            self.prepare()
        except CycleError as error:
            raise ValueError(f"The tasks {sorted(set(error.args[1]))} wait for each other.") from error

    def next_task(self) -> Task | None:
        """Take the first task that can start; `None` if all must wait for one that is running."""
        self._ready.update(self.get_ready())
        name = next((name for name in self._tasks if name in self._ready), None)
        self._ready.discard(name)
        return self._tasks.get(name)


def _side_by_side(order: _Order, work: Work, processes: int, screen: Screen) -> None:
    workers: list[_Worker] = []
    try:
        threads = max(torch.get_num_threads() // processes, 1)
        with _no_interrupts():
            workers += [_Worker(work, threads) for _ in range(processes)]
        while order.is_active():
            for worker in workers:
                if worker.task is None:
                    worker.start(order.next_task())
            busy = {worker.connection: worker for worker in workers if worker.task is not None}
            for connection in wait(list(busy)):
                busy[connection].listen(screen, order, processes)
    finally:
        # after an error too, and after Ctrl-C: what is not finished goes on from its checkpoint in the next run
        for worker in workers:
            worker.end()


class _Worker:
    """A process that does one task after the other, seen from the process that hands them out."""

    def __init__(self, work: Work, threads: int):
        # not fork: a forked process shares the state of torch's threads and of a GPU
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.task: Task | None = None
        self._process = context.Process(target=_serve, args=(theirs, work, threads))
        self._process.start()
        theirs.close()

    def start(self, task: Task | None) -> None:
        self.task = task
        if task is not None:
            # a worker that died is noticed when its answer is read
            try:
                self.connection.send(task.arguments)
            except BrokenPipeError:
                pass

    def listen(self, screen: Screen, order: _Order, processes: int) -> None:
        """Take one message: something to show, or the end of the task. Raises what the task raised."""
        try:
            kind, *content = self.connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise RunError(self._post_mortem(processes)) from error
        if kind == "done":
            order.done(self.task.name)
            self.task = None
        elif kind == "error":
            error, text = content
            raise error from WorkerTraceback(text)
        else:
            getattr(screen, kind)(*content)

    def _post_mortem(self, processes: int) -> str:
        code = self._process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
        advice = (
            f" If the memory did not suffice for {processes} phases at once, set `processes` to a smaller number."
            if code == -signal.SIGKILL
            else ""
        )
        return (
            f"The process of {self.task.name} {how}.{advice} Run the same command again: finished phases are kept, "
            "and others go on from their last checkpoint."
        )

    def end(self) -> None:
        self._process.terminate()
        # and what it has started: the processes of a data loader would wait for minutes for one that is gone
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.connection.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """
    Start processes that ignore Ctrl-C, from their first moment on: it reaches every process of a terminal, and the one
    that hands out the tasks ends the workers.
    """
    if threading.current_thread() is not threading.main_thread():
        # no other thread may change what happens at a signal
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, work: Work, threads: int) -> None:
    """What a worker process runs."""
    # a group of its own, so that whatever it starts can be ended with it
    os.setpgid(0, 0)
    # here a data loader would spawn its processes, which takes seconds, and leave their semaphores behind when killed
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # by default a semaphore, which would be left behind when the worker is ended; no bar is drawn here
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(threads)
    screen = RemoteScreen(connection)
    while True:
        arguments = connection.recv()
        try:
            work(screen, *arguments)
        except Exception as error:  # noqa: BLE001 - raised again where the tasks are handed out
            connection.send(("error", _that_can_be_sent(error), traceback.format_exc()))
        else:
            connection.send(("done",))


def _end_with_parent() -> None:
    """A worker that outlived a killed run would write into the folders of the next one."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def _that_can_be_sent(error: Exception) -> Exception:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a class may fail in any way while it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
