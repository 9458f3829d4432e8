"""
Benchmark of the input pipeline without a model, on JPEG files that it generates:

- images per second that one core decodes and augments, for each augmentation, and the time of each step of it;
- the fraction of the training time that is spent waiting for images, for several numbers of workers.

    python benchmarks/input_pipeline.py --image-size 224 --source-size 500 375 --workers 0 1 2 --json result.json

The second part simulates the device's work for a batch by a sleep of `--step-seconds`: set it to the value of your own
training. `needed workers` follows from the first part: images per second that the device consumes, divided by images
per second of one core.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from m2mkd.data import DataConfig, ImageDataset, LabeledImages, load_images
from m2mkd.data.augmentation import IMAGENET_CROP_AREA, random_resized_crop_flip
from m2mkd.data.mixing import mix_batch, random_erasing
from m2mkd.data.processing import PixelTransform
from m2mkd.data.rand_augment import rand_augment


AUGMENTATIONS: dict[str, dict[str, Any]] = {
    "evaluation": {"center_crop": 0.875},
    "affine": {"augmentation": "affine"},
    "crop_flip": {"augmentation": "crop_flip"},
    "crop_flip + colour jitter": {"augmentation": "crop_flip", "color_jitter": 0.4},
    "imagenet": {"augmentation": "imagenet"},
}


def main() -> None:
    """Measure, print tables, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image-size", type=int, default=224, help="side of the model's input, in pixels")
    parser.add_argument("--source-size", type=int, nargs=2, default=[500, 375], help="width and height of the files")
    parser.add_argument("--images", type=int, default=64, help="number of different files")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=16, help="steps for each number of workers")
    parser.add_argument(
        "--step-seconds", type=float, help="seconds of device work per batch; default: the speed of one core"
    )
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        data = photos(Path(folder), options.images, *options.source_size)
        rates = images_per_second(data, options)
        steps = step_seconds(data, options)
        device = options.step_seconds or options.batch_size / rates["imagenet"]
        waits = {workers: waiting_share(data, options, workers, device) for workers in options.workers}
    for name, rate in rates.items():
        print(f"{name:28} {rate:8.0f} images/s per core")
    for name, seconds in steps.items():
        print(f"  {name:26} {1000 * seconds:8.2f} ms per image")
    workers_needed = needed(rates, options, device)
    print(f"steps of {device:.3f} s for {options.batch_size} images; needed workers: {workers_needed:.1f}")
    for workers, share in waits.items():
        print(f"{workers:3} workers: {100 * share:5.1f} % of the time spent waiting")
    if options.json:
        result = {**vars(options), "json": str(options.json), "images_per_second": rates, "milliseconds": steps}
        result |= {"device_seconds": device, "waiting_share": waits, "needed_workers": workers_needed}
        options.json.write_text(json.dumps(result, indent=2))


def needed(rates: dict[str, float], options: argparse.Namespace, device: float) -> float:
    """Number of workers that keeps the device busy."""
    return options.batch_size / device / rates["imagenet"]


def photos(folder: Path, count: int, width: int, height: int) -> LabeledImages:
    """
    Generate smooth noise with grain as JPEG files, in two classes. A file of 500 x 375 pixels has about 110 kB, as in
    ImageNet (138 GB for 1.28 million files).
    """
    rng = np.random.default_rng(0)
    for index in range(count):
        target = folder / str(index % 2) / f"{index}.jpg"
        target.parent.mkdir(exist_ok=True)
        coarse = rng.integers(0, 256, (height // 6, width // 6, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
        grainy = np.clip(smooth + rng.normal(0, 14, smooth.shape), 0, 255).astype(np.uint8)
        Image.fromarray(grainy).save(target, quality=90)
    return load_images(DataConfig(source=f"imagefolder:{folder}"))


def config(options: argparse.Namespace, **changes: Any) -> DataConfig:
    """Configuration of a data set for one augmentation."""
    return DataConfig(source="x", image_size=options.image_size, **changes)


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU seconds over the repeats, after one warm-up. CPU time is used because others may share the core."""
    work()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return statistics.median(taken)


def images_per_second(data: LabeledImages, options: argparse.Namespace) -> dict[str, float]:
    """Images per second of one core, from the file to the pixels of a mixed batch."""
    rates = {}
    for name, changes in AUGMENTATIONS.items():
        dataset = ImageDataset(data, config(options, **changes), train=name != "evaluation")
        batches = [range(len(data))[start:][: options.batch_size] for start in range(0, len(data), options.batch_size)]

        def read(dataset: ImageDataset = dataset, batches: list[range] = batches) -> None:
            for batch in batches:
                dataset.__getitems__(batch)

        rates[name] = len(data) / median_seconds(read, options.repeats)
    return rates


def step_seconds(data: LabeledImages, options: argparse.Namespace) -> dict[str, float]:
    """Seconds per image of each step of the augmentation `imagenet`."""
    size, bicubic, rng = options.image_size, Image.Resampling.BICUBIC, np.random.default_rng(0)
    to_pixels = PixelTransform(config(options), is_cropped=True)
    decoded = [data.images[index] for index in range(len(data))]
    crops = [random_resized_crop_flip(image, size, bicubic, rng, IMAGENET_CROP_AREA) for image in decoded]
    pixels = [to_pixels(image) for image in crops]
    batch, labels = torch.stack(pixels[: options.batch_size]), torch.zeros(options.batch_size, dtype=torch.long)
    works: dict[str, Callable[[], object]] = {
        "decode": lambda: [data.images[index] for index in range(len(data))],
        "crop, resize, flip": lambda: [
            random_resized_crop_flip(image, size, bicubic, rng, IMAGENET_CROP_AREA) for image in decoded
        ],
        "RandAugment": lambda: [rand_augment(image, bicubic, (124, 116, 104), rng) for image in crops],
        "normalise": lambda: [to_pixels(image) for image in crops],
        "random erasing": lambda: [random_erasing(image, 0.25, rng) for image in pixels],
    }
    seconds = {name: median_seconds(work, options.repeats) / len(data) for name, work in works.items()}
    mix = median_seconds(lambda: mix_batch(batch, labels, 1000, 0.8, 1.0, rng), options.repeats)
    return {**seconds, "Mixup or CutMix": mix / len(batch)}


def waiting_share(data: LabeledImages, options: argparse.Namespace, workers: int, device: float) -> float:
    """Fraction of the time of a training loop in which the device waits for a batch."""
    dataset = ImageDataset(data, config(options, augmentation="imagenet"), train=True)
    loader = DataLoader(
        dataset,
        batch_size=options.batch_size,
        # one long epoch, because workers are idle between two epochs
        sampler=[index % len(data) for index in range((options.steps + 1) * options.batch_size)],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
    )
    waited = total = 0.0
    batches = iter(loader)
    next(batches)  # the first batch starts the workers and is not counted
    for _ in range(options.steps):
        start = time.perf_counter()
        next(batches)
        waited += time.perf_counter() - start
        time.sleep(device)
        total += time.perf_counter() - start
    return waited / total


if __name__ == "__main__":
    main()
