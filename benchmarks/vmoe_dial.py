"""
Accuracy, FLOPs and latency of a trained V-MoE whose compute is changed at inference, without training: experts per
token k, capacity factor C, with and without Batch Prioritized Routing.

    python benchmarks/vmoe_dial.py runs/digits --arm kd --out dial.png --json dial.json

With a capacity, groups of `--group-images` images compete for the places of an expert. Images at the end of a test set
that fill no batch of 250 are left out.
"""

import argparse
import copy
import itertools
import json
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from nac_pruning import EVALUATION_BATCH, first_images, latencies, like
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from m2mkd import VMoEForImageClassification
from m2mkd.experiment.flops import forward_flops_per_image
from m2mkd.experiment.recipe_file import load_recipe
from m2mkd.experiment.run_data import RunData


CAPACITIES = (1.5, 1.0, 0.75, 0.5, 0.25, 0.125)


def main() -> None:
    """Measure, print a table, draw a picture, and write JSON if requested."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run whose student is a V-MoE with token choice")
    parser.add_argument("--arm", default="kd", help="one of its arms")
    parser.add_argument("--group-images", type=int, default=50, help=f"a divisor of {EVALUATION_BATCH}")
    parser.add_argument("--repeats", type=int, default=20, help="timed forward passes of each setting")
    parser.add_argument("--out", type=Path, help="file of the picture")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    points = dial_curve(options.run, options.arm, options.group_images, options.repeats)
    show(points)
    if options.out:
        draw(points, options.out)
    if options.json:
        options.json.write_text(json.dumps(points, indent=2))


def dial_curve(run_folder: Path, arm: str, group_images: int, repeats: int) -> list[dict[str, Any]]:
    """One point for each setting: accuracies, fraction of dropped choices, FLOPs and seconds per image."""
    recipe = load_recipe(run_folder / "recipe.json")
    data = RunData(recipe)
    tests = {"iid": recipe.evaluation.iid, "ood": recipe.evaluation.ood}
    tests = {split: data.test_set(name, *like(recipe, data)) for split, name in tests.items() if name is not None}
    trained = VMoEForImageClassification.from_pretrained(run_folder / "arms" / arm).eval()
    images = first_images(tests["iid"], EVALUATION_BATCH)
    num_tokens = trained.vmoe(images[:1]).last_hidden_state.shape[1]
    points, models = [], []
    for setting in settings(trained.config.num_experts_per_tok, group_images * num_tokens):
        model = copy.deepcopy(trained)
        model.set_router(**setting)
        models.append(model)
        points.append(setting)
    for model, point in zip(models, tqdm(points, desc="accuracy"), strict=True):
        with torch.no_grad():
            dropped = model(images).dropped
        point["dropped"] = 0.0 if dropped is None else float(dropped)
        point["flops_per_image"] = forward_flops_per_image(model, images)
        for split, dataset in tests.items():
            point[split] = accuracy(model, dataset)
    for point, seconds in zip(points, latencies(models, images, repeats), strict=True):
        point["seconds_per_image"] = seconds / len(images)
    return points


@torch.no_grad()
def accuracy(model: VMoEForImageClassification, dataset: Dataset) -> float:
    """Fraction of the images of full batches that the model gets right."""
    batches = list(DataLoader(dataset, batch_size=EVALUATION_BATCH, drop_last=True))
    right = sum((model(batch["pixel_values"]).logits.argmax(-1) == batch["labels"]).sum().item() for batch in batches)
    return right / (EVALUATION_BATCH * len(batches))


def settings(trained_k: int, group_size: int) -> list[dict[str, Any]]:
    """Options of `set_router`: every k without capacity, then with each capacity, with and without priorities."""
    ks = range(trained_k, 0, -1)
    plain = [{"num_experts_per_tok": k, "capacity_factor": None, "batch_prioritized_routing": False} for k in ks]
    common = {"router_group_size": group_size, "capacity_multiple_of": 1}
    return plain + [
        {"num_experts_per_tok": k, "capacity_factor": capacity, "batch_prioritized_routing": prioritized, **common}
        for k, prioritized, capacity in itertools.product(ks, (False, True), CAPACITIES)
    ]


def curve_of(point: dict[str, Any]) -> str:
    """Name of the curve that a point belongs to."""
    if point["capacity_factor"] is None:
        return "no capacity"
    return f"k = {point['num_experts_per_tok']}, C{', BPR' if point['batch_prioritized_routing'] else ''}"


def show(points: list[dict[str, Any]]) -> None:
    """Print a table with one row per setting."""
    table = Table(title=f"A trained V-MoE with less compute, no training afterwards; batch {EVALUATION_BATCH}")
    for heading in ("setting", "k", "C", "dropped %", "IID %", "OOD %", "MFLOPs", "ms"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for point in points:
        table.add_row(
            curve_of(point),
            str(point["num_experts_per_tok"]),
            str(point["capacity_factor"] or "–"),
            f"{100 * point['dropped']:.0f}",
            f"{100 * point['iid']:.1f}",
            f"{100 * point['ood']:.1f}" if "ood" in point else "–",
            f"{point['flops_per_image'] / 1e6:.2f}",
            f"{1000 * point['seconds_per_image']:.3f}",
        )
    Console().print(table)


def draw(points: list[dict[str, Any]], path: Path) -> None:
    """Plot accuracy against FLOPs and against latency, one line per curve, with k or C at each point."""
    splits = [split for split in ("iid", "ood") if split in points[0]]
    figure = Figure(figsize=(11, 4 * len(splits)), layout="constrained")
    grid = figure.subplots(len(splits), 2, squeeze=False)
    axes_of = [("flops_per_image", 1e6, "MFLOPs per image"), ("seconds_per_image", 1e-3, "ms per image")]
    for (split, row), (column, (key, unit, label)) in itertools.product(
        zip(splits, grid, strict=True), enumerate(axes_of)
    ):
        for name, own in itertools.groupby(points, curve_of):
            chosen = list(own)
            xs = [point[key] / unit for point in chosen]
            row[column].plot(xs, [100 * point[split] for point in chosen], marker="o", label=name)
        row[column].set(xlabel=label, ylabel=f"{split.upper()} accuracy (%)")
        row[column].grid(alpha=0.3)
    grid[0][0].legend()
    figure.suptitle("A trained V-MoE with less compute, no training afterwards")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
