"""Runs tasks in an order that respects their dependencies, in parallel worker processes if requested."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait

import torch
from tqdm import tqdm

from m2mkd.errors import RunError
from m2mkd.experiment.engines.task import Order, Task, Work, WorkerTraceback, end_with_parent, that_can_be_sent
from m2mkd.screen import RemoteScreen, Screen


def run_tasks(tasks: Sequence[Task], work: Work, processes: int = 1) -> None:
    """
    Do all tasks. Whenever a process is free, it gets the first task in the list that does not wait for another one.

    Args:
        tasks (`Sequence[Task]`)
        work (`Callable`): Called as `work(screen, *task.arguments)`. With several processes, each gets a pickled copy
            of it, whose state stays in that process.
        processes (`int`, *optional*, defaults to 1): Number of tasks to do at once. 1: in this process, without
            workers. The threads of this process are divided among the workers.

    Raises:
        `RunError`: a worker process was killed. An error in a task is raised here as well. In both cases, the other
            workers are stopped.
    """
    screen, order = Screen(), Order(tasks)
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


def _side_by_side(order: Order, work: Work, processes: int, screen: Screen) -> None:
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
        # also after an error or Ctrl-C: unfinished phases resume from their checkpoints in the next run
        for worker in workers:
            worker.end()


class _Worker:
    """A worker process that does one task after the other, as seen by the process that distributes the tasks."""

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
            # a dead worker is detected when its answer is read
            try:
                self.connection.send(task.arguments)
            except BrokenPipeError:
                pass

    def listen(self, screen: Screen, order: Order, processes: int) -> None:
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
            f" If there was not enough memory for {processes} phases at once, set `processes` to a smaller number."
            if code == -signal.SIGKILL
            else ""
        )
        return (
            f"The process of {self.task.name} {how}.{advice} Run the same command again: finished phases are kept, "
            "and the others resume from their last checkpoint."
        )

    def end(self) -> None:
        self._process.terminate()
        # and the processes that it started: those of a data loader would wait for minutes for a dead parent
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.join()
        self.connection.close()


@contextmanager
def _no_interrupts() -> Iterator[None]:
    """
    Context manager in which new processes ignore Ctrl-C from the start. Ctrl-C reaches every process of a terminal,
    and the one that distributes the tasks stops the workers.
    """
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set signal handlers
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _serve(connection: Connection, work: Work, threads: int) -> None:
    """Main function of a worker process."""
    # its own process group, so that all processes that it starts can be stopped with it
    os.setpgid(0, 0)
    # otherwise a data loader would spawn its processes, which takes seconds, and leave semaphores behind when killed
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)
    threading.Thread(target=end_with_parent, daemon=True).start()
    # the default is a semaphore, which would be left behind when the worker is stopped; no bar is drawn here
    tqdm.set_lock(threading.RLock())
    torch.set_num_threads(threads)
    screen = RemoteScreen(connection.send)
    while True:
        arguments = connection.recv()
        try:
            work(screen, *arguments)
        except Exception as error:  # noqa: BLE001 - raised again where the tasks are distributed
            connection.send(("error", that_can_be_sent(error), traceback.format_exc()))
        else:
            connection.send(("done",))
