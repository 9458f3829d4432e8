"""
Benchmark of one training step of m2mKD. It compares these variants in one process:

- all pairs together (one pass through the meta model) and the pairs one after the other;
- each experts implementation and the plain loop.

    python benchmarks/distillation_step.py --size small --batch-size 16 --json result.json

Seconds are medians over the repeats, which alternate between the variants. On a shared machine, only the ratios are
meaningful.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import ViTConfig, ViTForImageClassification

from m2mkd import M2MKDConfig, M2MKDTrainer, VMoEConfig, VMoEForImageClassification


# Width of teacher and meta model, teacher layers per stage, student width, student layers per stage, image size, patch
# size.
SIZES = {"tiny": (96, 2, 64, 1, 28, 7), "small": (384, 3, 192, 2, 64, 8), "base": (1024, 6, 768, 3, 224, 16)}
NUM_PAIRS = 4


def main() -> None:
    """Measure, print a table, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--experts", nargs="+", default=["eager", "grouped_mm"], help="experts implementations")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()

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
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": str(options.json), "seconds": results}, indent=2))


def trainer_for(size: str, pairs: list[int] | str) -> M2MKDTrainer:
    """Build a trainer with new networks of a size."""
    width, teacher_layers, student_width, student_layers, image_size, patch_size = SIZES[size]
    common = {"image_size": image_size, "patch_size": patch_size, "num_labels": 10}
    vit = {"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": width // 32, **common}
    student = VMoEConfig(
        hidden_size=student_width,
        intermediate_size=4 * student_width,
        num_attention_heads=student_width // 32,
        num_hidden_layers=student_layers * NUM_PAIRS,
        **common,
    )
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
        teacher=ViTForImageClassification(ViTConfig(num_hidden_layers=teacher_layers * NUM_PAIRS, **vit)),
        meta=ViTForImageClassification(ViTConfig(num_hidden_layers=NUM_PAIRS, **vit)),
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
