"""How a report is shown: tables and sentences for terminal and Markdown, and the picture."""

import io
import json
import math
from typing import Any

import yaml
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from m2mkd.trainer.report import ARMS, Histories, Report, Result


COVERS = {
    "e2e": "end-to-end training",
    "e2e_equal_compute": "end-to-end training, with the compute of m2mkd's distillation as extra epochs",
    "kd": "end-to-end training towards the teacher's outputs",
    "kd_equal_compute": "end-to-end training towards the teacher's outputs, with the compute of m2mkd's distillation "
    "as extra epochs",
    "m2mkd": "distillation of all pairs and end-to-end training",
}
COLUMNS = ("Model", "IID %", "OOD %", "End-to-end epochs", "Images", "Labels", "Train time", "Parameters", "TFLOPs")
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


# ---- Words and numbers ----


def comparison_sentence(comparison: dict[str, Any]) -> str:
    """One comparison in plain words. A difference within one standard deviation of 0 is called no clear difference."""
    arm, baseline = comparison["arm"], comparison["baseline"]
    splits = [(name, comparison[name.lower()]) for name in ("IID", "OOD") if comparison[name.lower()] is not None]
    parts = [f"{name} {_difference(split)}, {_verdict(split, arm)}" for name, split in splits]
    ratio = comparison.get("budget_ratio")
    note = ""
    if ratio is not None and abs(ratio - 1) > BUDGET_TOLERANCE:
        note = f" Beware: the budgets are not equal, {baseline} had {ratio:.3g} times that of {arm}."
    return f"{arm} − {baseline} at {comparison['budget']}: {'; '.join(parts)}.{note}"


def _difference(split: dict[str, Any]) -> str:
    mean = f"{100 * split['mean_difference']:+.1f}".replace("-", "−")
    if split["std"] is None:
        return f"{mean} points (one seed)"
    return f"{mean} ± {100 * split['std']:.1f} points (higher with {split['wins']} of {split['n']} seeds)"


def _verdict(split: dict[str, Any], arm: str) -> str:
    if split["std"] is None:
        return "too few seeds to tell a difference"
    if abs(split["mean_difference"]) <= split["std"]:
        return "no clear difference"
    return f"{arm} is {'better' if split['mean_difference'] > 0 else 'worse'}"


def _accuracy(result: Result, summary: dict[str, Any] | None, split: str) -> str:
    if result[split] is None:
        return "–"
    over_seeds = (summary or {}).get(split)
    if over_seeds is None or over_seeds["std"] is None:
        return f"{100 * result[split]['accuracy']:.1f}"
    return f"{100 * over_seeds['mean']:.1f} ± {100 * over_seeds['std']:.1f}"


def _seconds(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def _count(number: float) -> str:
    return f"{number:,.0f}"


def _millions(number: float) -> str:
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
    return {name: result for name, result in {**_networks(report), **arms}.items() if result is not None}


def _networks(report: Report) -> dict[str, Result | None]:
    return {"teacher": report["teacher"], "meta": report["meta"]}


def _result_rows(report: Report) -> list[list[str]]:
    return [
        [
            name,
            _accuracy(result, report["summary"].get(name), "iid"),
            _accuracy(result, report["summary"].get(name), "ood"),
            _epochs(result),
            _count(result["images"]),
            _count(result["labels"]),
            _seconds(result["train_seconds"]),
            _millions(result["parameters"]),
            _tflops(result["train_flops"]),
        ]
        for name, result in _results(report).items()
    ]


def _caption(report: Report) -> str:
    seeds, caption = list(report["seeds"]), "Images and labels are distinct ones."
    if len(seeds) > 1:
        caption = (
            f"Accuracy of the arms: mean ± sample standard deviation over the seeds {', '.join(seeds)}; teacher and "
            f"meta model are shared by all seeds. The other columns are of seed {report['seed']}. {caption}"
        )
    if "m2mkd" in report["arms"]:
        caption += " Time, TFLOPs, images and labels of m2mkd include its distillation."
    return caption


def _compute_rows(report: Report) -> list[list[str]]:
    rows = []
    for name, result in _results(report).items():
        networks = [network for network in ARMS.get(name, ()) if report[network] is not None]
        total = result["train_flops"] + sum(report[network]["train_flops"] for network in networks)
        covers, extra = COVERS.get(name, "all of its training"), " and ".join(networks) or "–"
        own = [_tflops(result["train_flops"]), _seconds(result["train_seconds"])]
        rows.append([name, covers, *own, extra, _tflops(total) if name in ARMS else "–"])
        for phase, costs in result.get("phases", {}).items():
            own = [_tflops(costs["train_flops"]), _seconds(costs["train_seconds"])]
            rows.append([f"– {name}: {phase}", f"part of {name}", *own, "", ""])
    return rows


def _data_rows(report: Report) -> list[list[str]]:
    rows = []
    for name, result in _results(report).items():
        phases = {f"– {name}: {phase}": costs for phase, costs in result.get("phases", {}).items()}
        for label, costs in {name: result, **phases}.items():
            rows.append([label, *(_count(costs[key]) for key in ("images", "labels", "train_samples_seen"))])
    return rows


def print_tables(report: Report, console: Console) -> None:
    """Print the table of results and the sentences of the comparisons."""
    table = Table(title=f"{_name(report)} on {report['device']}", caption=_caption(report), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "Model" else "right", no_wrap=column == "Model")
    for row in _result_rows(report):
        table.add_row(*row)
    console.print(table)
    for comparison in report["comparisons"]:
        console.print(comparison_sentence(comparison), markup=False, highlight=False)


def _name(report: Report) -> str:
    return str(report["recipe"].get("name") or "a run without a name")


def _markdown_table(header: tuple[str, ...], rows: list[list[str]], left: int) -> str:
    """A GitHub table whose first `left` columns are aligned left and the others right."""
    rule = ["---" if index < left else "---:" for index in range(len(header))]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(header), rule, *rows])


def to_markdown(report: Report) -> str:
    """The report as GitHub Markdown; it shows report.png of the same folder."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    incubated = "incubation" in ((report["teacher"] or {}).get("phases") or {})
    compute_header = ("Model", "Covers", "TFLOPs", "Train time", "Extra, not covered", "TFLOPs with the extra")
    data_header = ("Model", "Distinct images", "Distinct labels", "Samples seen")
    sections = [
        f"# {_name(report)}",
        f"Seeds {', '.join(report['seeds'])} · {report['device']} · {versions} · {report.get('date') or 'undated'}",
        "## Results",
        _markdown_table(COLUMNS, _result_rows(report), left=1),
        _caption(report),
        "\n".join(f"- {comparison_sentence(comparison)}" for comparison in report["comparisons"]),
        "![Accuracy, training curves, distillation and expert load](report.png)",
        "## Compute",
        "No arm's own compute covers the training of the networks that it needs: m2mkd needs the teacher and the meta "
        "model, kd needs the teacher. Where they are not at hand already, they are extra, and the last column adds "
        "them." + (" This teacher was itself incubated inside the meta model." if incubated else ""),
        _markdown_table(compute_header, _compute_rows(report), left=2),
        "## Training data",
        _markdown_table(data_header, _data_rows(report), left=1),
        "## Reproduce",
        "Save this as `recipe.yaml` and run `m2mkd run recipe.yaml`, or `accelerate launch train.py recipe.yaml`:",
        f"```yaml\n{yaml.safe_dump(report['recipe'], sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"
