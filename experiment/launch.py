"""Starts a run again in one process per device, with a configuration of accelerate by its name."""

import os
import sys
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import NoReturn

import torch
from accelerate.utils import is_deepspeed_available

from m2mkd.errors import RecipeError


def launch(name: str, devices: int | None, arguments: Sequence[str]) -> NoReturn:
    """
    Replace this process by `accelerate launch`.

    Args:
        name (`str`): A file in `recipes/accelerate`, without its ending.
        devices (`int`, *optional*): Number of processes. `None`: one per accelerator of this machine.
        arguments (`Sequence[str]`): What the command line `m2mkd` gets in each process.

    Raises:
        `RecipeError`: there is no such configuration, DeepSpeed is missing, there are no accelerators, or this process
            was launched itself.
    """
    folder = Path(str(resources.files("m2mkd.accelerate_configs")))
    known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise RecipeError(
            f"--accelerate is {name!r}, but there are only {', '.join(known)}. For a file of your own: accelerate "
            "launch --config_file FILE train.py RECIPE"
        )
    if name.startswith("deepspeed") and not is_deepspeed_available():
        raise RecipeError(f"--accelerate {name} needs DeepSpeed: pip install deepspeed. Or take fsdp2.")
    if "LOCAL_RANK" in os.environ:
        raise RecipeError(
            f"--accelerate {name} starts a process per device, but a launcher has already started this one. Leave "
            "out one of them."
        )
    devices = devices or torch.accelerator.device_count()
    if devices == 0:
        raise RecipeError(f"--accelerate {name} starts a process per GPU, but there is none here. Leave it out.")
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(known[name])]
    own = ["--num_processes", str(devices), "-m", "m2mkd.cli", *arguments]
    os.execv(sys.executable, [*launcher, *own])
