"""The figure of a study: accuracy against compute and against time."""

import io
import statistics
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from m2mkd.experiment.arms import colors
from m2mkd.experiment.report.collect import arms_of
from m2mkd.experiment.study.results import Results


AXES = {
    "train_flops": ("training compute (TFLOPs)", 1e-12),
    "train_seconds": ("training time on one device (s)", 1.0),
    "parallel_seconds": ("training time with one device per pair (s)", 1.0),
}


def render_figure(study: Results) -> bytes:
    """Render as PNG: a row for each test set, a column for each unit of cost, a curve for each arm."""
    splits = [split for split in ("iid", "ood") if _measured(study, split)]
    figure = Figure(figsize=(16, 4.6 * len(splits) + 0.6), dpi=100, layout="constrained")
    seeds = ", ".join(map(str, study["seeds"]))
    figure.suptitle(f"{study['name']}: mean over the seeds {seeds}, band: ± one standard deviation")
    own = colors(list(arms_of(study["curves"]).values()))
    grid = figure.subplots(len(splits), len(AXES), squeeze=False)
    for row, split in zip(grid, splits, strict=True):
        for axes, unit in zip(row, AXES, strict=True):
            _draw(axes, study, split, unit, own)
    grid[0][0].legend(fontsize=9, frameon=False, loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _measured(study: Results, split: str) -> bool:
    return all(
        own[split] is not None
        for curve in study["curves"].values()
        for point in curve["points"]
        for own in point["seeds"].values()
    )


def _draw(axes: Axes, study: Results, split: str, unit: str, color: dict[str, str]) -> None:
    label, scale = AXES[unit]
    everyone: list[tuple[float, float]] = []
    for name, curve in study["curves"].items():
        points = [_statistics(point, split, unit, scale) for point in curve["points"]]
        points.sort()
        x, mean, spread = (list(column) for column in zip(*points, strict=True))
        everyone += list(zip(x, mean, strict=True))
        axes.plot(x, mean, color=color[name], marker="o", markersize=4, linewidth=1.8, label=name)
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(x, low, high, color=color[name], alpha=0.15, linewidth=0)
    frontier = _frontier(everyone)
    style = {"color": "black", "linestyle": ":", "linewidth": 1.2, "drawstyle": "steps-post"}
    axes.plot(*zip(*frontier, strict=True), label="frontier", **style)
    teacher = study["teacher"] and study["teacher"][split]
    if teacher is not None:
        axes.axhline(100 * teacher, color="black", linestyle="--", linewidth=1, label="teacher")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel(label)
    axes.set_ylabel(f"{split.upper()} accuracy (%)")
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)


def _statistics(point: Results, split: str, unit: str, scale: float) -> tuple[float, float, float]:
    own: list[dict[str, Any]] = list(point["seeds"].values())
    values = [100 * result[split] for result in own]
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return scale * statistics.fmean(result[unit] for result in own), statistics.fmean(values), spread


def _frontier(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points that no cheaper one is better than, by cost."""
    best: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points):
        if not best or accuracy > best[-1][1]:
            best.append((cost, accuracy))
    return best
