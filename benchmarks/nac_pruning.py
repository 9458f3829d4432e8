"""
Accuracy and latency of a trained NAC for different numbers of kept mediator latents, without training after the
pruning. `python benchmarks/nac.py --prune RUN_FOLDER` calls it.
"""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from m2mkd import NACForImageClassification
from m2mkd.evaluation.predict import evaluate_model
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import load_recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.modeling.latent_pruning import STRATEGIES


# training images used to measure importance
NUM_CALIBRATION_IMAGES = 256
KEEP = (1.0, 0.75, 0.5, 0.375, 0.25, 0.125)
EVALUATION_BATCH = 250


def prune_curve(
    run_folder: Path, arm: str, keep: list[float] | None, batch_size: int, repeats: int
) -> list[dict[str, Any]]:
    """
    One point for each strategy and number of mediators: accuracy on the test sets of the run's recipe, median seconds
    of a forward pass (the models take turns in this process), FLOPs per image, and number of parameters.

    Args:
        run_folder (`Path`): Folder of a finished run of a NAC recipe.
        arm (`str`): Name of one of its arms.
        keep (`list[float]`, *optional*): Fractions of the mediators to keep, in (0, 1].
        batch_size (`int`): Number of images in a timed forward pass.
        repeats (`int`): Number of timed passes of each model.
    """
    recipe = load_recipe(run_folder / "recipe.json")
    data = RunData(recipe)
    whole = NACForImageClassification.from_pretrained(run_folder / "arms" / arm).eval()
    calibration = first_images(data.test_set(recipe.finetune.data, *like(recipe, data)), NUM_CALIBRATION_IMAGES)
    tests = {"iid": recipe.evaluation.iid, "ood": recipe.evaluation.ood}
    tests = {split: data.test_set(name, *like(recipe, data)) for split, name in tests.items() if name is not None}

    models, points = [], []
    shares = sorted(set(keep or KEEP), reverse=True)
    for strategy in STRATEGIES:
        for share in shares:
            model = whole.prune_latents(float(share), strategy, calibration)
            models.append(model)
            points.append({"strategy": strategy, "keep": share, "mediators": model.config.num_mediator_latents})
    images = first_images(tests["iid"], batch_size)
    for model, point in zip(models, tqdm(points, desc="accuracy"), strict=True):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(images)
        point["flops_per_image"] = counter.get_total_flops() / len(images)
        point["parameters"] = model.num_parameters()
        for split, dataset in tests.items():
            point[split] = evaluate_model(model, dataset, EVALUATION_BATCH, use_cpu=True)["accuracy"]
    # The time depends only on the number of mediators that are kept, not on which ones.
    by_number = {model.config.num_mediator_latents: model for model in models}
    seconds = dict(zip(by_number, latencies(list(by_number.values()), images, repeats), strict=True))
    for point in points:
        point["seconds"] = seconds[point["mediators"]]
    return points


def like(recipe: Recipe, data: RunData) -> tuple[str, list[str]]:
    """Name and classes of the training set that the arms were trained on, for `RunData.test_set`."""
    return recipe.finetune.data, data.class_names(recipe.finetune.data)


def first_images(dataset: torch.utils.data.Dataset, number: int) -> torch.Tensor:
    """Pixels of shape `(number, 3, image_size, image_size)`; fewer images if the data set has fewer."""
    return next(iter(DataLoader(dataset, batch_size=number, shuffle=False)))["pixel_values"]


@torch.no_grad()
def latencies(models: list[NACForImageClassification], images: torch.Tensor, repeats: int) -> list[float]:
    """Median seconds of a forward pass of each model; they take turns, so that a busy moment affects all of them."""
    seconds: list[list[float]] = [[] for _ in models]
    for _ in tqdm(range(repeats + 1), desc="latency"):
        for model, measured in zip(models, seconds, strict=True):
            model.eval()
            start = time.perf_counter()
            model(images)
            measured.append(time.perf_counter() - start)
    return [statistics.median(measured[1:]) for measured in seconds]


def show_curve(points: list[dict[str, Any]], batch_size: int) -> None:
    """Print a table with one row per point."""
    table = Table(title=f"Mediators kept, no training afterwards; ms and MFLOPs per image, batch {batch_size}")
    columns = ("strategy", "kept", "IID %", "OOD %", "ms", "x faster", "MFLOPs", "parameters")
    for heading in columns:
        table.add_column(heading, justify="left" if heading == "strategy" else "right")
    slowest = max(point["seconds"] for point in points if point["keep"] == max(p["keep"] for p in points))
    for point in points:
        table.add_row(
            point["strategy"],
            str(point["mediators"]),
            f"{100 * point['iid']:.1f}",
            f"{100 * point['ood']:.1f}" if "ood" in point else "–",
            f"{1000 * point['seconds'] / batch_size:.3f}",
            f"{slowest / point['seconds']:.2f}",
            f"{point['flops_per_image'] / 1e6:.2f}",
            f"{point['parameters']:,}",
        )
    Console().print(table)


def draw_curve(points: list[dict[str, Any]], batch_size: int, path: Path) -> None:
    """Plot accuracy against ms per image, one line per strategy and test set, with the mediators at each point."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for strategy, color in zip(STRATEGIES, ("#0072B2", "#D55E00"), strict=True):
        chosen = sorted(
            (point for point in points if point["strategy"] == strategy), key=lambda point: point["mediators"]
        )
        for split, style in (("iid", "-"), ("ood", "--")):
            if split not in chosen[0]:
                continue
            milliseconds = [1000 * point["seconds"] / batch_size for point in chosen]
            accuracy = [100 * point[split] for point in chosen]
            axes.plot(milliseconds, accuracy, style, color=color, marker="o", label=f"{strategy}, {split.upper()}")
            for x, y, point in zip(milliseconds, accuracy, chosen, strict=True):
                axes.annotate(
                    str(point["mediators"]), (x, y), xytext=(0, 5), textcoords="offset points", ha="center", fontsize=8
                )
    axes.set(
        xlabel=f"ms per image, batch {batch_size}",
        ylabel="accuracy, %",
        title="Mediators kept, no training afterwards",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
