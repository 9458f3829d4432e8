"""Work for the tasks of test_ray.py, which the processes of nodes import by name."""

import os
import signal
import time
from pathlib import Path

import torch
from schedule_work import wait_for

from m2mkd.errors import RunError
from m2mkd.screen import Screen


def meet(screen: Screen, folder: Path, name: str) -> None:
    """`first` and `second` wait for each other. Each leaves a file about what it has."""
    (folder / f"{name}.begun").touch()
    for other in {"first": ["second"], "second": ["first"]}.get(name, []):
        wait_for(folder / f"{other}.begun")
        screen.say(f"{name} met {other}")
    has = f"{torch.get_num_threads()} threads, GPU {os.environ.get('CUDA_VISIBLE_DEVICES', '')}"
    (folder / name).write_text(f"{has}, token {os.environ.get('HF_TOKEN')}")


def add(screen: Screen, folder: Path, name: str) -> None:
    """Add 1 and 2 in two processes; in the task `bad`, the second fails while the first waits for it."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    if name == "bad" and rank == 1:
        raise RunError("rank 1 has no room")
    value = torch.tensor(rank + 1.0)
    torch.distributed.all_reduce(value)
    screen.say(f"process {rank} says {value.item():g}")
    (folder / f"{name}-{rank}").write_text(f"{value.item():g}")
    torch.distributed.destroy_process_group()


def fail(screen: Screen, folder: Path, name: str) -> None:
    """The task `bad` fails once `long` is on its way, which would take forever; `killed` is killed."""
    (folder / name).write_text(str(os.getpid()))
    with (folder / f"{name}.tries").open("a") as file:
        file.write("x")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "long":
        time.sleep(600)
    wait_for(folder / "long")
    raise RunError(f"{name} has no room")
