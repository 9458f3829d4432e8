"""The number of processes that read images."""

import os


SMALL_IMAGE = 32  # pixels; up to this size, making a batch takes less time than passing it between processes


def default_workers(image_size: int, use_cpu: bool) -> int:
    """Default number of worker processes of a data loader.

    With a GPU, one worker per core, divided among the processes of this machine: at 224 pixels with the paper's
    augmentation, a core prepares about 200 images per second (benchmarks/input_pipeline.py) and a GPU consumes more,
    so every core helps. Zero on a CPU, where training needs the cores itself, and for images of up to 32 pixels.

    Args:
        image_size: side of the model's input, in pixels.
        use_cpu: whether the network runs on the CPU.
    """
    if use_cpu or image_size <= SMALL_IMAGE:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
