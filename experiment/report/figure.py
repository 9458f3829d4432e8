"""The figure of a report: accuracies, training curves and the load of the experts."""

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from m2mkd.experiment.arms import colors, reference
from m2mkd.experiment.report.collect import Histories, arms_of
from m2mkd.experiment.report.markdown import name_of
from m2mkd.model_cards.tables import Report


# Epochs and values of a curve.
Points = tuple[list[float], list[float]]


def render_figure(report: Report, histories: Histories) -> bytes:
    """Render the figure as PNG, 14 × 9 inches at 110 dpi (half as high for two panels), without empty panels."""
    pairs, kind = pair_curves(histories)
    panels: list[tuple[Callable[..., str], Any]] = [
        (_draw_accuracy, report["summary"]),
        (_draw_curves, arm_curves(report, histories)),
        (partial(_draw_pairs, kind=kind), pairs),
        (_draw_load, main_load(report)),
    ]
    panels = [(draw, data) for draw, data in panels if data]
    layout = {1: "a", 2: "ab", 3: "ab;cc", 4: "ab;cd"}[len(panels)]
    size = (14.0 if len(panels) > 1 else 9.0, 9.0 if len(panels) > 2 else 4.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(f"{name_of(report)}, seed{'s' * (len(report['seeds']) > 1)} {', '.join(report['seeds'])}")
    for (letter, axes), (draw, data) in zip(figure.subplot_mosaic(layout).items(), panels, strict=True):
        title = draw(axes, report, data)
        axes.set_title(f"({letter}) {title}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def colors_of(report: Report) -> dict[str, str]:
    """The color of each arm of a report."""
    return colors(list(arms_of(report["arms"]).values()))


def main_load(report: Report) -> tuple[str, dict[str, list[float]]] | None:
    """Name and expert load of the arm that the others are compared with, otherwise of the first arm with experts."""
    compared = reference(list(arms_of(report["arms"]).values()))
    names = [*([] if compared is None else [compared.name]), *report["arms"]]
    return next(((name, load) for name in names if (load := report["arms"][name]["expert_load"])), None)


def _points(log: list[dict[str, Any]], name: str) -> Points:
    """Epochs and values in % of the entries that have `name`; values that are not finite are left out."""
    found = [(entry["epoch"], 100 * entry[name]) for entry in log if "epoch" in entry and name in entry]
    points = sorted(point for point in found if all(math.isfinite(value) for value in point))
    return [x for x, _ in points], [y for _, y in points]


def arm_curves(report: Report, histories: Histories) -> dict[str, dict[str, Points]]:
    """
    `{arm: {seed: points}}` of the arms and seeds that were trained themselves and evaluated during training: TFLOPs
    spent so far, those before the end-to-end phase included, and accuracy.
    """
    curves: dict[str, dict[str, Points]] = {}
    for arm, result in report["arms"].items():
        for seed, log in histories.get("arms", {}).get(arm, {}).items() if not result.get("same_as") else ():
            epochs, values = _points(log, "eval_accuracy")
            own = result.get("phases", {}).get("finetune", result)
            if epochs and own["epochs"]:
                before, an_epoch = result["train_flops"] - own["train_flops"], own["train_flops"] / own["epochs"]
                curves.setdefault(arm, {})[str(seed)] = [(before + x * an_epoch) / 1e12 for x in epochs], values
    return curves


def pair_curves(histories: Histories) -> tuple[dict[int, Points], str]:
    """Points by pair, and what they show: the test set, or training batches if nothing was evaluated."""
    logs = sorted((int(index), log) for index, log in histories.get("pairs", {}).items())
    test, training = "IID accuracy", "accuracy on training batches"
    error = "squared error of hidden states, of their variance"
    kinds = {"eval_pair_{}_boundary_error": error, "pair_{}_boundary_error": error}
    kinds |= {"eval_pair_{}_accuracy": test, "eval_accuracy": test, "pair_{}_accuracy": training}
    for name, kind in kinds.items():
        curves = {index: _points(log, name.format(index)) for index, log in logs}
        curves = {index: points for index, points in curves.items() if points[0]}
        if curves:
            return curves, kind
    return {}, ""


def _draw_accuracy(axes: Axes, report: Report, summary: dict[str, Any]) -> str:
    arms, color = list(summary), colors_of(report)
    tops: list[float] = [1.0]
    centres: dict[str, float] = {}
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    for split in (split for split in ("iid", "ood") if any(summary[arm][split] for arm in arms)):
        left = len(centres) * (len(arms) + 1.5)
        centres[split.upper()] = left + (len(arms) - 1) / 2
        for place, arm in ((left + index, arm) for index, arm in enumerate(arms) if summary[arm][split]):
            mean, std = 100 * summary[arm][split]["mean"], summary[arm][split]["std"]
            error: dict[str, Any] = {} if std is None else {"yerr": 100 * std, "capsize": 4}
            axes.bar(place, mean, 0.85, color=color[arm], label=arm if split == "iid" else None, **error)
            tops.append(mean + 100 * (std or 0))
            # legible where the teacher's line runs through it
            behind = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
            axes.annotate(f"{mean:.1f}", (place, tops[-1]), (0, 3), ha="center", bbox=behind, **text)
        if report["teacher"] is not None and report["teacher"][split] is not None:
            tops.append(100 * report["teacher"][split]["accuracy"])
            right = left + len(arms) - 0.4
            axes.hlines(tops[-1], left - 0.6, right, color="black", linestyle="--", linewidth=1.2)
            axes.annotate(f"teacher\n{tops[-1]:.1f}", (right, tops[-1]), (3, 0), va="center", **text)
    axes.set_xticks(list(centres.values()), list(centres))
    axes.set_xlim(-1.5, max(centres.values()) + len(arms) / 2 + 1.2)
    axes.set_ylim(0, 1.12 * max(tops))
    axes.set_yticks([tick for tick in axes.get_yticks() if tick <= min(100, 1.12 * max(tops))])
    axes.set_ylabel("test accuracy (%)")
    axes.legend(ncols=5, fontsize=9, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07), columnspacing=1.0)
    return f"Accuracy of the arms{' (mean ± std over seeds)' if len(report['seeds']) > 1 else ''}"


def _draw_curves(axes: Axes, report: Report, curves: dict[str, dict[str, Points]]) -> str:
    color = colors_of(report)
    for arm, seeds in curves.items():
        line = "-" if report["arms"][arm]["arm"]["budget"] is None else "--"
        for seed, (flops, values) in seeds.items():
            first = seed == str(report["seed"])
            style: dict[str, Any] = {"linewidth": 2.2, "label": arm, "zorder": 3} if first else {"linewidth": 0.8}
            marker = "o" if len(flops) <= 5 and first else None
            axes.plot(flops, values, color=color[arm], linestyle=line, marker=marker, **style)
    _finish_curves(axes, "training compute (TFLOPs), with that before the end-to-end phase", "IID accuracy (%)", 1)
    note = f" (bold: seed {report['seed']}, thin: the other seeds)" if len(report["seeds"]) > 1 else ""
    return f"End-to-end training{note}"


def _draw_pairs(axes: Axes, report: Report, pairs: dict[int, Points], kind: str) -> str:
    for place, (index, (epochs, values)) in enumerate(pairs.items()):
        color = colormaps["viridis"](0.9 * place / max(len(pairs) - 1, 1))
        marker: dict[str, Any] = {"marker": "osv^D"[place % 5], "markevery": max(len(epochs) // 8, 1), "markersize": 5}
        axes.plot(epochs, values, color=color, linewidth=1.8, label=f"pair {index}", **marker)
    _finish_curves(axes, "epochs of distillation", f"{kind} (%)", math.ceil(len(pairs) / 5))
    context = (report["recipe"].get("distill") or {}).get("context", "meta")
    around = "teacher" if context == "teacher" else "meta model"
    return f"Distillation: one student stage inside the {around} (seed {report['seed']})"


def _finish_curves(axes: Axes, x_label: str, y_label: str, columns: int) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if "epochs" in x_label and axes.get_xlim()[1] > 2:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False, loc="lower right", ncols=columns)


def _draw_load(axes: Axes, report: Report, named: tuple[str, dict[str, list[float]]]) -> str:
    """Draw layers × experts; the color is the fraction relative to the uniform one, so 1 is a balanced layer."""
    arm, load = named
    layers = sorted(load, key=lambda name: (not name.isdigit(), int(name) if name.isdigit() else 0, name))
    width = max(len(shares) for shares in load.values())
    relative = [[share * len(load[layer]) for share in load[layer]] for layer in layers]
    top = max(2.0, *(value for row in relative for value in row))
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=top)
    cells = [row + [math.nan] * (width - len(row)) for row in relative]
    image = axes.imshow(cells, aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
    if len(layers) <= 16 and width <= 16:
        for row, layer in enumerate(layers):
            for column, share in enumerate(load[layer]):
                color = "white" if abs(norm(relative[row][column]) - 0.5) > 0.3 else "black"
                axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=8, color=color)
    axes.set_yticks(range(len(layers)), layers)
    axes.xaxis.set_major_locator(MaxNLocator(16, integer=True))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = axes.figure.colorbar(image, ax=axes, ticks=[0, 0.5, 1, top], format="%.2g")
    bar.set_label("fraction relative to uniform (1 = balanced)")
    uniform = f", uniform: {100 / width:.3g} %" if len({len(row) for row in relative}) == 1 else ""
    dropped = report["arms"][arm].get("dropped")
    lost = "" if dropped is None else f", dropped: {100 * dropped:.3g} %"
    return f"Expert load of {arm}, seed {report['seed']} (% of the tokens' choices{uniform}{lost})"
