"""Work for the processes of test_local.py, which import it by name."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from m2mkd.errors import RunError
from m2mkd.screen import Screen


class CannotBeSent(Exception):
    """An error that pickle cannot make again."""

    def __init__(self, value: int, unit: str):
        super().__init__(f"{value} {unit}")


def wait_for(path: Path) -> None:
    for _ in range(3000):  # a busy machine takes its time
        if path.exists():
            return
        time.sleep(0.1)
    raise TimeoutError(path)


def work(screen: Screen, folder: Path, name: str, *needs: str) -> None:
    """Leave a file that says in which process and with how many threads; before that, wait for the files `needs`."""
    screen.say(f"{name} begins")
    (folder / f"{name}.begun").touch()
    for need in needs:
        wait_for(folder / need)
    (folder / name).write_text(f"{os.getpid()} {torch.get_num_threads()}")


def fail(screen: Screen, folder: Path, name: str) -> None:
    """The task `bad` fails once `long` is on its way, which would take forever; others fail each in their own way."""
    (folder / name).write_text(str(os.getpid()))
    if name == "long":
        time.sleep(600)
    wait_for(folder / "long")
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise RunError(f"{name}: no room") if name == "bad" else CannotBeSent(3, "apples")


def sleep(screen: Screen, folder: Path, name: str) -> None:
    """Start a process, as a data loader does, and wait with it."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    (folder / f"{name}.tmp").write_text(f"{os.getpid()} {child.pid}")
    (folder / f"{name}.tmp").rename(folder / name)
    time.sleep(600)
