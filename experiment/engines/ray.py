"""Runs tasks as tasks of Ray, on the nodes of a cluster that all see the run's folder."""

import logging
import os
import socket
import threading
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from m2mkd.errors import M2MKDError, RunError
from m2mkd.experiment.engines.task import Order, Task, Work, WorkerTraceback, end_with_parent, that_can_be_sent
from m2mkd.files import explained_write_errors
from m2mkd.screen import RemoteScreen, Screen


# How often a task starts again after its process or node was lost.
RESTARTS = 5
# How often the driver looks for messages and finished tasks.
_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_STOP = 30.0
_SAME_FOLDER = "Mount it there under the same path, or start the command in a folder that all nodes see."
_SAME_PACKAGE = "Install the same m2mkd[ray] on all nodes."
Message = tuple[Any, ...]
Send = Callable[[Message], object]


def run_tasks(tasks: Sequence[Task], work: Work, folder: str | Path) -> None:
    """
    Do all tasks, each part of one on its own, on the nodes of the cluster that `RAY_ADDRESS` names, else of the one
    that this machine is a node of, else in a Ray that is started on this machine.

    A part whose process or node is lost starts again. Everything that the tasks show is shown here.

    Args:
        tasks (`Sequence[Task]`)
        work (`Callable`): Called as `work(screen, *task.arguments, part)`; a pickled copy of it on each node. A part
            that has several GPUs is done by as many processes (torchrun), which all call it.
        folder (`str` or `Path`): A folder that all nodes must see, under the same path.

    Raises:
        `RunError`: there is no such cluster, a node does not see `folder`, no node has what a task needs, or a part
            was lost too often. An error in a task is raised here as well. In all cases, the other tasks are stopped.
    """
    screen = Screen()
    with _cluster():
        _check_folder(Path(folder).absolute())
        parts = [part for task in tasks for part in _apart(task, tasks)]
        driver = _Driver(parts, work, Path(folder), screen)
        try:
            driver.run()
        finally:
            driver.stop()
            screen.finish_all()


@contextmanager
def _cluster() -> Iterator[None]:
    """Connect this process to Ray, unless it is."""
    if ray.is_initialized():
        yield
        return
    # of a Ray that is started here
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(logging_level=logging.WARNING)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise RunError(
            f"There is no Ray cluster at RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}: {error}. Start it with `ray "
            "start`, or unset RAY_ADDRESS to use this machine only."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _nodes() -> list[dict[str, Any]]:
    """The nodes that can do tasks."""
    return [node for node in ray.nodes() if node["Alive"] and {"CPU", "GPU"} & node["Resources"].keys()]


def _check_folder(folder: Path) -> None:
    """Check that each node finds a file of this process in `folder`, and this process one of each node."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    look = ray.remote(num_cpus=0, max_retries=0)(_look)
    answers = []
    try:
        with explained_write_errors(probe):
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
        for node in _nodes():
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            own = probe.with_name(f"{probe.name}.{node['NodeID']}")
            answers.append((node, own, look.options(scheduling_strategy=there).remote(Path.cwd(), probe, own)))
        for node, own, answer in answers:
            try:
                problem = ray.get(answer)
            except RayError as error:
                problem = f"it cannot start a task: {error}. {_SAME_PACKAGE}"
            if problem is None and not own.exists():
                problem = f"what it writes into {folder} does not appear on {socket.gethostname()}. {_SAME_FOLDER}"
            if problem is not None:
                raise RunError(f"Node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {problem}")
    finally:
        for path in folder.glob(f"{probe.name}*"):
            path.unlink()


def _look(here: Path, there: Path, own: Path | None = None) -> str | None:
    """On a node: work in the driver's folder, see `there` and write `own`. Returns what is wrong."""
    try:
        os.chdir(here)
        if not there.exists():
            return f"it does not see {there} of {here}. {_SAME_FOLDER}"
        if own is not None:
            own.touch()
    except OSError as error:
        return f"it cannot use the run's folder: {error}. {_SAME_FOLDER}"
    return None


def _apart(task: Task, tasks: Sequence[Task]) -> list[Task]:
    """The parts of a task as tasks, each after all parts of those that the task waits for."""
    after = tuple(name for other in tasks if other.name in task.after for name in _names(other).values())
    return [
        replace(task, name=name, arguments=(*task.arguments, part), after=after, parts=())
        for part, name in _names(task).items()
    ]


def _names(task: Task) -> dict[str, str]:
    """Names of a task's parts as tasks."""
    return {part: task.name if len(task.parts) == 1 else f"{task.name}: {part}" for part in task.parts}


class _Mailbox:
    """Actor on the driver's node that keeps the messages of all tasks until the driver takes them."""

    def __init__(self) -> None:
        self._messages: list[Message] = []

    def put(self, message: Message) -> None:
        self._messages.append(message)

    def take(self) -> list[Message]:
        taken, self._messages = self._messages, []
        return taken


@dataclass(frozen=True)
class _Failure:
    """How a task failed on a host: the error in it, with its traceback; `None` if one of its processes was lost."""

    host: str
    error: Exception | None
    text: str


class _Driver:
    """Distributes tasks, and takes their messages and results."""

    def __init__(self, tasks: Sequence[Task], work: Work, folder: Path, screen: Screen):
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(num_cpus=0, scheduling_strategy=here)(_Mailbox).remote()
        self._work, self._folder, self._screen = ray.put(work), folder, screen
        self._remote = ray.remote(max_retries=0)(_serve)
        self._order = Order(tasks)
        self._running: dict[ray.ObjectRef, Task] = {}
        self._lost: dict[str, int] = {}
        self._needs = {task.name: _needs(task) for task in tasks}
        for task in tasks:
            _check_needs(task, self._needs[task.name])

    def run(self) -> None:
        """Do all tasks."""
        while self._order.is_active():
            while (task := self._order.next_task()) is not None:
                self._start(task)
            ended, _ = ray.wait(list(self._running), timeout=_SECONDS_BETWEEN_LOOKS)
            self._show()
            for reference in ended:
                self._end(reference)

    def stop(self) -> None:
        """Stop what runs: unfinished phases resume from their checkpoints in the next run."""
        for reference in self._running:
            ray.cancel(reference, force=True)
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=_SECONDS_TO_STOP)

    def _start(self, task: Task) -> None:
        needs = self._needs[task.name]
        remote = self._remote.options(name=task.name, **needs)
        self._running[remote.remote(self._work, task, needs, Path.cwd(), self._folder, self._mailbox)] = task

    def _show(self) -> None:
        for kind, *content in ray.get(self._mailbox.take.remote()):
            getattr(self._screen, kind)(*content)

    def _end(self, reference: ray.ObjectRef) -> None:
        task = self._running.pop(reference)
        try:
            failure = ray.get(reference)
        except RayTaskError as error:
            # not in the work, which returns its errors
            raise RunError(f"{task.name} cannot start on a node: {error.cause}. {_SAME_PACKAGE}") from error
        except RayError as error:
            self._start_again(task, f"{type(error).__name__}: {error}")
            return
        if failure is None:
            self._order.done(task.name)
        elif failure.error is None:
            self._start_again(task, f"a process on {failure.host} ended. {failure.text}")
        elif isinstance(failure.error, M2MKDError):
            raise RunError(f"{failure.error} (in {task.name}, on {failure.host})") from WorkerTraceback(failure.text)
        else:
            raise failure.error from WorkerTraceback(f"in {task.name}, on {failure.host}:\n{failure.text}")

    def _start_again(self, task: Task, how: str) -> None:
        self._screen.finish_all()
        self._lost[task.name] = self._lost.get(task.name, 0) + 1
        if self._lost[task.name] > RESTARTS:
            raise RunError(
                f"{task.name} was lost {self._lost[task.name]} times, at last so: {how} If there was not enough "
                "memory, give it more of a node (`resources`). Run the same command again: finished phases are kept, "
                "and the others resume from their last checkpoint."
            )
        self._screen.say(f"{task.name}: lost, and started again from its last checkpoint. {how}")
        self._start(task)


def _needs(task: Task) -> dict[str, float]:
    gpus = task.resources.gpus
    if gpus is None:
        gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0))
    return {"num_cpus": task.resources.cpus, "num_gpus": gpus}


def _check_needs(task: Task, needs: Mapping[str, float]) -> None:
    has = [(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0)) for node in _nodes()]
    if not any(cpus >= needs["num_cpus"] and gpus >= needs["num_gpus"] for cpus, gpus in has):
        found = ", ".join(sorted({f"{cpus:g} CPUs and {gpus:g} GPUs" for cpus, gpus in has}))
        raise RunError(
            f"{task.name} needs {needs['num_cpus']:g} CPUs and {needs['num_gpus']:g} GPUs on one node, but the nodes "
            f"have {found}. Lower `resources`, or start a node that has them."
        )


def _serve(
    work: Work, task: Task, needs: Mapping[str, float], here: Path, folder: Path, mailbox: Any
) -> _Failure | None:
    """Do a task on a node. An error is returned, so that Ray does not take it for a lost process."""
    host, sent = socket.gethostname(), []

    def send(message: Message) -> None:
        sent[:] = [mailbox.put.remote(message)]

    threads, processes = max(int(needs["num_cpus"]), 1), max(int(needs["num_gpus"]), 1)
    try:
        if problem := _look(here, folder):
            raise RunError(f"Node {host}: {problem}")
        send(("say", f"{task.name}: on {host}"))
        if processes > 1:
            _together(work, task.arguments, processes, max(threads // processes, 1), send)
        else:
            torch.set_num_threads(threads)
            work(RemoteScreen(send), *task.arguments)
    except ChildFailedError as error:
        return _Failure(host, None, str(error))
    except Exception as error:  # noqa: BLE001 - raised again by the driver
        return _Failure(host, that_can_be_sent(error), traceback.format_exc())
    finally:
        # what was sent arrives before the result
        ray.get(sent)
    return None


def _together(work: Work, arguments: Message, processes: int, threads: int, send: Send) -> None:
    """Do a task in several processes of this node, as torchrun starts them. Raises what the task raised."""
    ours, theirs = Pipe(duplex=False)
    errors: list[Exception] = []

    def forward() -> None:
        with suppress(EOFError):
            while True:
                kind, *content = ours.recv()
                if kind == "error":
                    errors.append(*content)
                else:
                    send((kind, *content))

    reader = threading.Thread(target=forward)
    reader.start()
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, _one_of_several)(work, arguments, threads, theirs)
    except ChildFailedError:
        if not errors:
            raise
    finally:
        theirs.close()
        reader.join()
    if errors:
        raise errors[0]


def _one_of_several(work: Work, arguments: Message, threads: int, connection: Connection) -> None:
    """Main function of one of the processes that do a task together."""
    os.setpgid(0, 0)
    threading.Thread(target=end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    is_main = os.environ["RANK"] == "0"
    try:
        work(RemoteScreen(connection.send if is_main else lambda message: None), *arguments)
    except Exception as error:
        connection.send(("error", that_can_be_sent(error)))
        raise
