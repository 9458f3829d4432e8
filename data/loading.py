"""How many processes read images."""

import os


SMALL_IMAGE = 32  # pixels; up to here a batch is ready sooner than it is handed over


def default_workers(image_size: int, use_cpu: bool) -> int:
    """Worker processes of a data loader where nobody says how many.

    With a GPU a core each, shared by the processes of this machine: at 224 pixels and the paper's augmentation a core
    makes some 200 images a second (benchmarks/input_pipeline.py) and a GPU takes more, so no core is too many.
    None on a CPU, where training needs the cores itself, nor for images of up to 32 pixels.

    Args:
        image_size: side of the model's input, in pixels.
        use_cpu: whether the network runs on the CPU.
    """
    if use_cpu or image_size <= SMALL_IMAGE:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
