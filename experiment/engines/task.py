"""What engines do: tasks, in an order that respects what they wait for."""

import multiprocessing
import os
import pickle
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from typing import Any

from m2mkd.experiment.recipe import Resources


@dataclass(frozen=True)
class Task:
    """
    A task that is done once.

    Args:
        name (`str`): Unique among the tasks.
        arguments (`tuple`): Arguments for the work function.
        after (`tuple[str, ...]`, *optional*): Tasks that must be finished first. A name that no task has counts as
            finished.
        parts (`tuple[str, ...]`, *optional*): Parts that can be done apart; the work function gets the name of one as
            a further argument. Without it, it does the whole task.
        resources (`Resources`, *optional*): What each of its parts needs.
    """

    name: str
    arguments: tuple[Any, ...]
    after: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()
    resources: Resources = field(default_factory=Resources)


Work = Callable[..., None]


class WorkerTraceback(Exception):
    """Cause of an error from another process: the traceback there, as text."""


class Order(TopologicalSorter[str]):
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


def end_with_parent() -> None:
    """Stop this process group with its parent: otherwise, it would write into the folders of the next run."""
    multiprocessing.parent_process().join()
    os.killpg(0, signal.SIGKILL)


def that_can_be_sent(error: Exception) -> Exception:
    """The error, or one with its message if it cannot be pickled."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001 - a class may fail in any way while it is pickled
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
