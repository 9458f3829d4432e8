"""How a report is shown: tables and sentences for terminal and Markdown, and the picture."""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import yaml
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2mkd.trainer.report import ARMS, Histories, Report, Result


COVERS = {
    "e2e": "end-to-end training",
    "kd": "end-to-end training towards the teacher's outputs, the teacher's forward passes included",
    "m2mkd": "distillation of all pairs, the passes through teacher and meta model included, and end-to-end training",
}
COLUMNS = ("Model", "IID %", "OOD %", "End-to-end epochs", "Images", "Labels", "Train time", "Parameters", "TFLOPs")
COST_COLUMNS = ("Model", "Images", "Labels", "Samples seen", "Train time", "TFLOPs", "Extra", "TFLOPs with the extra")
HYBRID_COLUMNS = {"before": "Before alignment %", "after": "When distilled %"}
# Okabe and Ito's colours, told apart by colour-blind readers; an arm and its equal-compute twin are of one family.
COLORS = {
    "e2e": "#0072B2",
    "e2e_equal_compute": "#56B4E9",
    "kd": "#D55E00",
    "kd_equal_compute": "#E69F00",
    "m2mkd": "#009E73",
}
# A budget that differs by more than this share is said to differ.
BUDGET_TOLERANCE = 0.05
# Epochs and values of a curve.
Points = tuple[list[float], list[float]]


# ---- Words and numbers ----


def comparison_sentence(comparison: dict[str, Any]) -> str:
    """
    One comparison in plain words. A difference is called clear if it is more than one standard deviation away from 0
    and every seed has it.
    """
    arm, baseline = comparison["arm"], comparison["baseline"]
    splits = [(name, comparison[name.lower()]) for name in ("IID", "OOD") if comparison[name.lower()] is not None]
    parts = [f"{name} {_difference(split)}, {_verdict(split, arm)}" for name, split in splits]
    ratio = 1 if comparison["budget_ratio"] is None else comparison["budget_ratio"]
    beware = f" Beware: the budgets are not equal, {baseline} had {ratio:.3g} times that of {arm}."
    note = beware if abs(ratio - 1) > BUDGET_TOLERANCE else ""
    return f"{arm} − {baseline} at {comparison['budget']}: {'; '.join(parts)}.{note}"


def _difference(split: dict[str, Any]) -> str:
    mean = f"{100 * split['mean_difference']:+.1f}".replace("-", "−")
    if split["std"] is None:
        return f"{mean} points (one seed)"
    return f"{mean} ± {100 * split['std']:.1f} points ({split['wins']} of {split['n']} seeds)"


def _verdict(split: dict[str, Any], arm: str) -> str:
    if split["std"] is None:
        return "too few seeds to tell a difference"
    mean = split["mean_difference"]
    if abs(mean) <= split["std"] or any(value * mean <= 0 for value in split["values"]):
        return "no clear difference"
    return f"{arm} is {'better' if mean > 0 else 'worse'}"


def _accuracy(report: Report, name: str, result: Result, split: str) -> str:
    """Accuracy in %, over the seeds if there are several; says so if an arm has fewer of them than the report."""
    if result[split] is None:
        return "–"
    summary = report["summary"].get(name)
    if summary is None or summary[split] is None:
        return f"{100 * result[split]['accuracy']:.1f}"
    mean, std, count = summary[split]["mean"], summary[split]["std"], len(summary[split]["values"])
    spread = "" if std is None else f" ± {100 * std:.1f}"
    note = f" ({count} of {len(report['seeds'])} seeds)" if count < len(report["seeds"]) else ""
    return f"{100 * mean:.1f}{spread}{note}"


def _seconds(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min" if seconds >= 60 else f"{seconds:.3g} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def _parameters(number: float) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number / 1e3:,.1f} K"


def _tflops(flops: float) -> str:
    tera = flops / 1e12
    return f"{tera:,.0f}" if tera >= 100 else f"{tera:.3g}"


def _epochs(result: Result) -> str:
    """Epochs of end-to-end training: an incubated teacher's are those of its fine-tuning."""
    return f"{result.get('phases', {}).get('finetuning', result)['epochs']:.4g}"


# ---- Tables ----


def _results(report: Report) -> dict[str, Result]:
    """Teacher, meta model and arms of the first seed, those that there are, in the order of the tables."""
    arms = {arm: report["arms"][arm] for arm in ARMS if arm in report["arms"]}
    results = {"teacher": report["teacher"], "meta": report["meta"], **arms}
    return {name: result for name, result in results.items() if result is not None}


def _result_rows(report: Report) -> list[list[str]]:
    rows = []
    for name, result in _results(report).items():
        scores = [_accuracy(report, name, result, split) for split in ("iid", "ood")]
        seen = [_epochs(result), f"{result['images']:,}", f"{result['labels']:,}", _seconds(result["train_seconds"])]
        rows.append([name, *scores, *seen, _parameters(result["parameters"]), _tflops(result["train_flops"])])
    return rows


def _caption(report: Report) -> str:
    seeds, caption = list(report["seeds"]), "Images and labels: distinct ones of the training sets."
    if len(seeds) > 1:
        caption = (
            f"Accuracy of the arms: mean ± sample standard deviation over the seeds {', '.join(seeds)}; teacher and "
            f"meta model are shared by all seeds. The other columns are of seed {report['seed']}. {caption}"
        )
    if "m2mkd" in report["arms"]:
        caption += " Train time, TFLOPs, images and labels of m2mkd include its distillation."
    return caption


def _cost_rows(report: Report) -> list[list[str]]:
    """What each network and arm, and each of their phases, saw and cost; arms also with the networks they need."""
    rows = []
    for name, result in _results(report).items():
        extra = {network: report[network] for network in ARMS.get(name, ())}
        known = [network for network, own in extra.items() if not own.get("pretrained")]
        total = result["train_flops"] + sum(extra[network]["train_flops"] for network in known)
        names = [network if network in known else f"{network} (published, not counted)" for network in extra]
        rows.append([name, *_costs(result), ", ".join(names) or "–", _tflops(total) if name in ARMS else "–"])
        for phase, costs in result.get("phases", {}).items():
            rows.append([f"– of it {phase}", *_costs(costs), "", ""])
    return rows


def _costs(costs: Result) -> list[str]:
    counts = [f"{costs[name]:,}" for name in ("images", "labels", "train_samples_seen")]
    return [*counts, _seconds(costs["train_seconds"]), _tflops(costs["train_flops"])]


def _compute_notes(report: Report) -> str:
    """What the compute of each arm covers and what it leaves out, one point a line."""
    notes = []
    for arm in (arm for arm in ARMS if arm in report["arms"]):
        if same := report["arms"][arm].get("same_as"):
            notes.append(f"- {arm}: the model of {same}, whose end-to-end epochs take m2mkd's FLOPs or more.")
            continue
        own = COVERS[arm.removesuffix("_equal_compute")]
        twin = "; as many epochs as m2mkd's FLOPs allow" if arm.endswith("_equal_compute") else ""
        needs = " and ".join({"teacher": "the teacher", "meta": "the meta model"}[network] for network in ARMS[arm])
        notes.append(
            f"- {arm}: {own}{twin}. {f'Training {needs} is extra.' if needs else 'It needs no other network.'}"
        )
    if "incubation" in (report["teacher"] or {}).get("phases", {}):
        notes.append("- The teacher was itself incubated inside the meta model, whose training its row leaves out.")
    return "\n".join(notes)


def _hybrid_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: accuracy of the meta model with one teacher stage in it, as far as it was measured."""
    stages = report["hybrids"]["stages"]
    measured = [when for when in HYBRID_COLUMNS if any(accuracies[when] is not None for accuracies in stages.values())]
    rows = []
    for index, accuracies in stages.items():
        values = [accuracies[when] for when in measured]
        rows.append([index, *("–" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["Teacher stage", *(HYBRID_COLUMNS[when] for when in measured)], rows


def _hybrid_table(report: Report) -> Table:
    table = Table(
        title="Teacher stages inside the meta model", caption=_hybrid_caption(report), caption_justify="left"
    )
    columns, rows = _hybrid_rows(report)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _hybrid_caption(report: Report) -> str:
    hybrids = report["hybrids"]
    return (
        f"Accuracy of the meta model with one teacher stage in it, whose logits the pairs are distilled from "
        f"({hybrids['n']:,} images, {hybrids['set']}). The teacher's own: {100 * hybrids['teacher']:.1f} %; chance: "
        f"{100 * hybrids['chance']:.1f} %."
    )


def print_tables(report: Report, console: Console) -> None:
    """Print the table of results and the sentences of the comparisons."""
    title = escape(f"{_name(report)} on {report['device']}")
    table = Table(title=title, caption=_caption(report), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "Model" else "right", no_wrap=column == "Model")
    for row in _result_rows(report):
        table.add_row(*row)
    console.print(table)
    if report.get("hybrids"):
        console.print(_hybrid_table(report))
    for comparison in report["comparisons"]:
        console.print(comparison_sentence(comparison), markup=False, highlight=False, soft_wrap=True)


def _name(report: Report) -> str:
    return str(report["recipe"].get("name") or "a run without a name")


def markdown_table(header: Sequence[str], rows: list[list[str]]) -> str:
    """A GitHub table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def results_section(report: Report) -> str:
    """What was measured, as Markdown: the table, its caption, and the comparisons in words."""
    sentences = "\n".join(f"- {comparison_sentence(comparison)}" for comparison in report["comparisons"])
    parts = [markdown_table(COLUMNS, _result_rows(report)), _caption(report), sentences]
    return "\n\n".join(part for part in parts if part)


def compute_section(report: Report) -> str:
    """What the networks cost, as Markdown: the table, and what it covers."""
    covers = f"What the compute of each arm covers (the table is of seed {report['seed']}):"
    return "\n\n".join([markdown_table(COST_COLUMNS, _cost_rows(report)), covers, _compute_notes(report)])


def to_markdown(report: Report) -> str:
    """The report as GitHub Markdown; it shows report.png of the same folder."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sections = [
        f"# {_name(report)}",
        f"Seeds {', '.join(report['seeds'])} · {report['device']} · {versions} · {report.get('date') or 'undated'}",
        "## Results",
        results_section(report),
        _hybrid_section(report),
        "![Accuracy and the course of training](report.png)",
        _graph_section(report),
        "## Training data and compute",
        compute_section(report),
        "## Reproduce",
        "Save this as `recipe.yaml` and run `m2mkd run recipe.yaml`, or `accelerate launch train.py recipe.yaml`:",
        f"```yaml\n{yaml.safe_dump(report['recipe'], sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _hybrid_section(report: Report) -> str:
    """What the pairs were distilled from; nothing where no pair was distilled from a teacher."""
    if not report.get("hybrids"):
        return ""
    table = markdown_table(*_hybrid_rows(report))
    return f"## Teacher stages inside the meta model\n\n{table}\n\n{_hybrid_caption(report)}"


def _graph_section(report: Report) -> str:
    """The graph of a NAC; nothing for other students."""
    if not report.get("graph_density"):
        return ""
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in report["graph_density"].items())
    return (
        "## Graph\n\nShare of the mediators' pairs that the truncated kernel of their signatures connects: "
        f"{shares}.\n\n![Signature-kernel adjacency before and after training](graph.png)"
    )


# ---- Picture ----


def render_figure(report: Report, histories: Histories) -> bytes:
    """The picture as PNG, 14 × 9 inches at 110 dpi (half as high for two panels); panels without data are left out."""
    pair_curves, kind = _pair_curves(histories)
    panels: list[tuple[Callable[..., str], Any]] = [
        (_draw_accuracy, report["summary"]),
        (_draw_curves, _arm_curves(report, histories)),
        (partial(_draw_pairs, kind=kind), pair_curves),
        (_draw_load, report["arms"].get("m2mkd", {}).get("expert_load")),
    ]
    panels = [(draw, data) for draw, data in panels if data]
    layout = {1: "a", 2: "ab", 3: "ab;cc", 4: "ab;cd"}[len(panels)]
    size = (14.0 if len(panels) > 1 else 9.0, 9.0 if len(panels) > 2 else 4.8)
    figure = Figure(figsize=size, dpi=110, layout="constrained")
    figure.suptitle(f"{_name(report)}, seed{'s' * (len(report['seeds']) > 1)} {', '.join(report['seeds'])}")
    for (letter, axes), (draw, data) in zip(figure.subplot_mosaic(layout).items(), panels, strict=True):
        title = draw(axes, report, data)
        axes.set_title(f"({letter}) {title}", loc="left", fontsize=11)
        axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _points(log: list[dict[str, Any]], name: str) -> Points:
    """Epochs and values in % of the entries that have `name`; values that are not finite are left out."""
    found = [(entry["epoch"], 100 * entry[name]) for entry in log if "epoch" in entry and name in entry]
    points = sorted(point for point in found if all(math.isfinite(value) for value in point))
    return [x for x, _ in points], [y for _, y in points]


def _arm_curves(report: Report, histories: Histories) -> dict[str, dict[str, Points]]:
    """`{arm: {seed: points}}` of the arms and seeds that were trained by themselves and evaluated meanwhile."""
    curves: dict[str, dict[str, Points]] = {}
    for arm in (arm for arm, result in report["arms"].items() if not result.get("same_as")):
        for seed, log in histories.get("arms", {}).get(arm, {}).items():
            if (points := _points(log, "eval_accuracy"))[0]:
                curves.setdefault(arm, {})[str(seed)] = points
    return curves


def _pair_curves(histories: Histories) -> tuple[dict[int, Points], str]:
    """Points by pair, and what they are of: the test set, or training batches where nothing was evaluated."""
    logs = sorted((int(index), log) for index, log in histories.get("pairs", {}).items())
    test, training = "IID accuracy", "accuracy on training batches"
    for name, kind in (("eval_pair_{}_accuracy", test), ("eval_accuracy", test), ("pair_{}_accuracy", training)):
        curves = {index: _points(log, name.format(index)) for index, log in logs}
        curves = {index: points for index, points in curves.items() if points[0]}
        if curves:
            return curves, kind
    return {}, ""


def _draw_accuracy(axes: Axes, report: Report, summary: dict[str, Any]) -> str:
    arms = [arm for arm in ARMS if arm in summary]
    tops: list[float] = [1.0]
    centres: dict[str, float] = {}
    text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 9}
    for split in (split for split in ("iid", "ood") if any(summary[arm][split] for arm in arms)):
        left = len(centres) * (len(arms) + 1.5)
        centres[split.upper()] = left + (len(arms) - 1) / 2
        for place, arm in ((left + index, arm) for index, arm in enumerate(arms) if summary[arm][split]):
            mean, std = 100 * summary[arm][split]["mean"], summary[arm][split]["std"]
            error: dict[str, Any] = {} if std is None else {"yerr": 100 * std, "capsize": 4}
            axes.bar(place, mean, 0.85, color=COLORS[arm], label=arm if split == "iid" else None, **error)
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
    for arm, seeds in curves.items():
        line = "--" if arm.endswith("equal_compute") else "-"
        for seed, (epochs, values) in seeds.items():
            first = seed == str(report["seed"])
            style: dict[str, Any] = {"linewidth": 2.2, "label": arm, "zorder": 3} if first else {"linewidth": 0.8}
            marker = "o" if len(epochs) <= 5 and first else None
            axes.plot(epochs, values, color=COLORS[arm], linestyle=line, marker=marker, **style)
    _finish_curves(axes, "end-to-end epochs", "IID accuracy (%)", 1)
    note = f" (bold: seed {report['seed']}, thin: the other seeds)" if len(report["seeds"]) > 1 else ""
    return f"End-to-end training{note}"


def _draw_pairs(axes: Axes, report: Report, pairs: dict[int, Points], kind: str) -> str:
    for place, (index, (epochs, values)) in enumerate(pairs.items()):
        color = colormaps["viridis"](0.9 * place / max(len(pairs) - 1, 1))
        marker: dict[str, Any] = {"marker": "osv^D"[place % 5], "markevery": max(len(epochs) // 8, 1), "markersize": 5}
        axes.plot(epochs, values, color=color, linewidth=1.8, label=f"pair {index}", **marker)
    _finish_curves(axes, "epochs of distillation", f"{kind} (%)", math.ceil(len(pairs) / 5))
    return f"Distillation: one student stage inside the meta model (seed {report['seed']})"


def _finish_curves(axes: Axes, x_label: str, y_label: str, columns: int) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_xlim()[1] > 2:
        axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, frameon=False, loc="lower right", ncols=columns)


def _draw_load(axes: Axes, report: Report, load: dict[str, list[float]]) -> str:
    """Layers × experts; the colour is the share relative to the uniform one, so that 1 is a balanced layer."""
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
    bar.set_label("share relative to uniform (1 = balanced)")
    uniform = f", uniform: {100 / width:.3g} %" if len({len(row) for row in relative}) == 1 else ""
    return f"Expert load of m2mkd, seed {report['seed']} (% of the tokens' choices{uniform})"
