"""The machine of a run: number of phases at once, and number of threads."""

import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import PartialState

from m2mkd.errors import RunError
from m2mkd.experiment.recipe import Recipe


# Pixels; up to this size, making a batch takes less time than passing it between processes.
SMALL_IMAGE = 32


def num_processes(recipe: Recipe) -> int:
    """Number of phases that run at once. Raises `RunError` if several processes already share each phase."""
    alone = PartialState().num_processes == 1
    if recipe.engine == "ray" and not alone:
        raise RunError(
            f"`engine` is ray, but {PartialState().num_processes} processes were started. Start one: Ray starts the "
            "others, as many for each phase as `resources` has GPUs for it."
        )
    if recipe.processes is not None:
        if recipe.processes > 1 and not alone:
            raise RunError(
                f"`processes` is {recipe.processes}, but {PartialState().num_processes} processes already share each "
                "phase. Leave out `processes`, or start only one process."
            )
        return recipe.processes
    if not alone or torch.accelerator.is_available():
        return 1
    # small networks gain nothing from a second thread, but much from a second process
    return min(torch.get_num_threads(), len(recipe.arms) * (1 + len(recipe.repeat_seeds)))


def use_all_cores() -> None:
    """
    Use all cores if this is the only process on a CPU: `accelerate launch` gives a process one thread by default.
    """
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if launched and PartialState().num_processes == 1 and not torch.accelerator.is_available():
        torch.set_num_threads(_num_cores())


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers(image_size: int, use_cpu: bool) -> int:
    """
    Default number of worker processes of a data loader.

    With a GPU, one worker per core, divided among the processes of this machine: at 224 pixels with the paper's
    augmentation, a core prepares about 200 images per second (benchmarks/input_pipeline.py) and a GPU consumes more,
    so every core helps. Zero on a CPU, where training needs the cores itself, and for images of up to 32 pixels.

    Args:
        image_size (`int`): Side of the model's input, in pixels.
        use_cpu (`bool`): Whether the network runs on the CPU.
    """
    if use_cpu or image_size <= SMALL_IMAGE:
        return 0
    return max(1, _num_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def reset_peak_memory() -> None:
    """Count the peak of [`peak_memory`] from now on."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    else:
        with suppress(OSError):
            # proc(5): 5 resets the peak of the resident set size
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """
    Peak memory in bytes: of this process's tensors on a GPU, otherwise of the whole process. `None` where the system
    does not tell.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with suppress(OSError):
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        return None if found is None else 1024 * int(found[1])
    return None


def device_in_words(recipe: Recipe) -> str:
    """Describe the device of the run as text."""
    if recipe.engine == "ray":
        return "nodes of a Ray cluster"
    processes = num_processes(recipe)
    aside = f", up to {processes} phases side by side" if processes > 1 else ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return f"{device}{aside}"
