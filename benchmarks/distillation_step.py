"""
Benchmark of one training step of m2mKD. It compares these variants in one process:

- all pairs together (one pass through the meta model) and the pairs one after the other;
- each experts implementation and the plain loop;
- all pairs together, in the teacher's context with its hidden states as targets (fed by the teacher or by the
  student, with the teacher or with a cache) and in the paper's context, with ordinary distillation (kd) of the same
  student from the same teacher, for several numbers of pairs.

    python benchmarks/distillation_step.py --size small --batch-size 16 --json result.json
    python benchmarks/distillation_step.py --memory --size base --batch-size 2

Seconds are medians over the repeats, which alternate between the variants; they include reading the batch and the
backward pass, not the optimizer. On a shared machine, only the ratios are meaningful. `--memory` measures the peak of
the resident memory of processes that train for two steps of AdamW instead: one for each of 4 pairs, with a cache, and
one for kd.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from m2mkd import M2MKDConfig, M2MKDTrainer, TargetCache, VMoEConfig, VMoEForImageClassification
from m2mkd.data import DataConfig, ImageDataset, LabeledImages
from m2mkd.distillation.split import new_network
from m2mkd.experiment.flops import training_flops_per_image


# Width of teacher and meta model, teacher layers per stage, student width, student layers per stage, image size, patch
# size.
SIZES = {"tiny": (96, 2, 64, 1, 28, 7), "small": (384, 3, 192, 2, 64, 8), "base": (1024, 6, 768, 3, 224, 16)}
NUM_PAIRS = 4
# Layers of teacher and student where the number of pairs varies.
LAYERS = 20
TEACHER_CONTEXT = {"context": "teacher", "match": "boundary"}


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="experts implementations")
    parser.add_argument("--pairs", type=int, nargs="*", default=[2, 4, 10], help="numbers of pairs to compare with kd")
    parser.add_argument("--memory", action="store_true", help="measure the memory of processes instead")
    parser.add_argument("--trained", help=argparse.SUPPRESS)  # what a process of --memory trains
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    if options.trained:
        print(train_alone(options.trained, options.size, options.batch_size, options.cache))
        return
    if options.memory:
        write_json(options, {"memory": compare_memory(options.size, options.batch_size)})
        return

    together = trainer_for(options.size, "all")
    alone = [trainer_for(options.size, [index]) for index in range(NUM_PAIRS)]
    batch = images(options.size, options.batch_size, together.args.device)
    results: dict[str, dict[str, float]] = {}
    variants: dict[str, Callable[[], None]] = {
        "all pairs together": lambda: step(together, batch),
        "pairs one by one": lambda: [step(trainer, batch) for trainer in alone],
    }
    results["pairs"] = measure(variants, options.repeats)
    results["experts"] = measure(
        {name: with_experts(together, name, batch) for name in options.experts}, options.repeats
    )
    for group, seconds in results.items():
        slowest = max(seconds.values())
        for name, value in seconds.items():
            print(f"{group:8} {name:20} {1000 * value:9.1f} ms   {slowest / value:5.2f} x the slowest's speed")
    against_kd = {number: compare_with_kd(options, number) for number in options.pairs}
    write_json(options, {"seconds": results, "against_kd": against_kd})


def write_json(options: argparse.Namespace, results: dict[str, Any]) -> None:
    """Write the options and the results if a file is given."""
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        options.json.write_text(json.dumps({**settings, **results}, indent=2))


def trainer_for(size: str, pairs: list[int] | str) -> M2MKDTrainer:
    """Build a trainer with new networks of a size."""
    _, teacher_layers, _, student_layers, _, _ = SIZES[size]
    student, teacher = configs(size, student_layers * NUM_PAIRS, teacher_layers * NUM_PAIRS)
    args = M2MKDConfig(
        output_dir=tempfile.mkdtemp(),
        student_depths=[student_layers] * NUM_PAIRS,
        teacher_depths=[teacher_layers] * NUM_PAIRS,
        pairs=pairs,
        report_to="none",
    )
    return M2MKDTrainer(
        model=VMoEForImageClassification(student),
        args=args,
        teacher=ViTForImageClassification(teacher),
        meta=ViTForImageClassification(ViTConfig(**{**teacher.to_dict(), "num_hidden_layers": NUM_PAIRS})),
    )


def images(size: str, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Make a batch of noise."""
    side = SIZES[size][4]
    return {
        "pixel_values": torch.randn(batch_size, 3, side, side, device=device),
        "labels": torch.randint(10, (batch_size,), device=device),
    }


def step(trainer: M2MKDTrainer, batch: dict[str, torch.Tensor]) -> None:
    """Run a forward and backward pass of the pairs of a trainer."""
    trainer.model.zero_grad()
    trainer.compute_loss(trainer.model, batch).backward()
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def configs(size: str, student_layers: int, teacher_layers: int) -> tuple[VMoEConfig, ViTConfig]:
    """The student and the teacher of a size."""
    width, _, student_width, _, image_size, patch_size = SIZES[size]
    common = {"image_size": image_size, "patch_size": patch_size, "num_labels": 10}
    sizes = [
        {"hidden_size": own, "intermediate_size": 4 * own, "num_attention_heads": own // 32, **common}
        for own in (student_width, width)
    ]
    return (
        VMoEConfig(**sizes[0], num_hidden_layers=student_layers),
        ViTConfig(**sizes[1], num_hidden_layers=teacher_layers),
    )


def noise(size: str, count: int) -> ImageDataset:
    """A training set of noise without augmentation."""
    side, rng = SIZES[size][4], np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)) for _ in range(count)]
    names = [str(label) for label in range(10)]
    data = LabeledImages(pictures, np.arange(count) % 10, names, [str(index) for index in range(count)])
    return ImageDataset(data, DataConfig(source="noise", image_size=side), train=True)


def compare_with_kd(options: argparse.Namespace, number: int) -> dict[str, dict[str, float]]:
    """FLOPs per image and seconds per step of all pairs, and of kd; print their ratios to kd's."""
    student, teacher = configs(options.size, LAYERS, LAYERS)
    dataset, depths = noise(options.size, options.batch_size), [LAYERS // number] * number
    cut = {"student_depths": depths, "teacher_depths": depths}
    folder = Path(tempfile.mkdtemp()) / "cache"
    cache = TargetCache.write(folder, ViTForImageClassification(teacher), depths, dataset, say=lambda size: None)

    def trainer(has_cache: bool = False, **arguments: Any) -> tuple[M2MKDTrainer, list[Any]]:
        networks: dict[str, Any] = {} if has_cache else {"teacher": ViTForImageClassification(teacher)}
        if arguments.get("context") == "meta":
            meta = {**teacher.to_dict(), "num_hidden_layers": number}
            networks["meta"] = ViTForImageClassification(ViTConfig(**meta))
        model = VMoEForImageClassification(student)
        args = M2MKDConfig(output_dir=tempfile.mkdtemp(), report_to="none", **arguments)
        targets = cache if has_cache else None
        made = M2MKDTrainer(model, args, **networks, targets=targets, train_dataset=dataset)
        return made, [model, *networks.values()]

    trainers = {
        "kd": trainer(),
        "fed by the teacher": trainer(**cut, **TEACHER_CONTEXT),
        "fed by the student": trainer(**cut, **TEACHER_CONTEXT, feed="student"),
        "paper's context": trainer(**cut, context="meta"),
        "kd, cache": trainer(has_cache=True),
        "fed by the teacher, cache": trainer(has_cache=True, **cut, **TEACHER_CONTEXT),
        "fed by the student, cache": trainer(has_cache=True, **cut, **TEACHER_CONTEXT, feed="student"),
    }
    variants = {name: reading_step(own) for name, (own, _) in trainers.items()}
    seconds = measure(variants, options.repeats)
    found = {
        name: {"flops": training_flops_per_image(*own), "seconds": seconds[name]} for name, own in trainers.items()
    }
    for name, own in found.items():
        ratios = {unit: own[unit] / found["kd"][unit] for unit in own}
        print(
            f"{number:2} pairs  {name:28} {own['flops'] / 1e9:8.3f} GFLOPs/image, {ratios['flops']:.3f} of kd's   "
            f"{1000 * own['seconds']:9.1f} ms, {ratios['seconds']:.3f} of kd's"
        )
    return found


def reading_step(trainer: M2MKDTrainer) -> Callable[[], None]:
    """Return a function that reads the batch and runs a step."""

    def run() -> None:
        samples = [trainer.train_dataset[index] for index in range(len(trainer.train_dataset))]
        step(trainer, trainer._prepare_inputs(trainer.data_collator(samples)))

    return run


def compare_memory(size: str, batch_size: int) -> dict[str, int]:
    """Peak resident memory, in bytes, of a fresh process for each of 4 pairs and for kd; print the ratios to kd's."""
    folder, found = tempfile.mkdtemp(), {}
    for trained in ("nothing", "cache", "kd", "kd, cache", *map(str, range(NUM_PAIRS))):
        command = [sys.executable, __file__, "--size", size, "--batch-size", str(batch_size)]
        command += ["--trained", trained, "--cache", f"{folder}/cache"]
        # the Trainer prints before it
        found[trained] = int(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.split()[-1])
    base = found["nothing"]
    for name, peak in found.items():
        whole, growth = peak / found["kd"], (peak - base) / (found["kd"] - base)
        cached = (peak - base) / (found["kd, cache"] - base)
        print(
            f"{name:10} {peak / 2**30:6.2f} GiB, {whole:.3f} of kd's; growth over a process that trains nothing: "
            f"{growth:.3f} of kd's, {cached:.3f} of that of kd with a cache"
        )
    return found


def train_alone(trained: str, size: str, batch_size: int, folder: Path) -> int:
    """Train one pair, or the whole student by kd, for two steps of AdamW. Returns this process's peak in bytes."""
    depths = {"student": [SIZES[size][3]] * NUM_PAIRS, "teacher": [SIZES[size][1]] * NUM_PAIRS}
    student, teacher = configs(size, sum(depths["student"]), sum(depths["teacher"]))
    dataset = noise(size, batch_size)
    if trained == "cache":
        network = ViTForImageClassification(teacher)
        TargetCache.write(folder, network, depths["teacher"], dataset, batch_size=batch_size, say=lambda size: None)
    elif trained != "nothing":
        common = {"output_dir": tempfile.mkdtemp(), "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        common |= {"max_steps": 2, "per_device_train_batch_size": batch_size, "logging_strategy": "no"}
        pairs = [int(trained)] if trained.isdigit() else None
        cut = {f"{name}_depths": own for name, own in depths.items()}
        args = M2MKDConfig(**common, **({**cut, **TEACHER_CONTEXT, "pairs": pairs} if pairs else {}))
        network = ViTForImageClassification(teacher) if trained == "kd" else None
        targets = None if trained == "kd" else TargetCache(folder)
        # the stages of other pairs stay on the meta device
        model = new_network(student, depths["student"], 0, pairs)
        M2MKDTrainer(model, args, teacher=network, targets=targets, train_dataset=dataset).train()
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(peak[1])


def with_experts(trainer: M2MKDTrainer, name: str, batch: dict[str, torch.Tensor]) -> Callable[[], None]:
    """Return a function that runs a step with one experts implementation."""

    def run() -> None:
        trainer.student.set_experts_implementation(name)
        step(trainer, batch)

    return run


def measure(variants: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Median seconds of each variant; the variants take turns, so that a busy moment affects all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repeat in range(repeats + 1):
        for name, run in variants.items():
            start = time.perf_counter()
            run()
            if repeat > 0:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
