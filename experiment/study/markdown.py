"""A study in words: the table of its points, and a sentence for each comparison."""

import statistics
from typing import Any

from m2mkd.experiment.study.results import Results, mean_flops
from m2mkd.model_cards.tables import markdown_table


COLUMNS = ("Curve", "Values", "IID %", "OOD %", "TFLOPs", "with extras", "Labels", "Time", "with a device per pair")


_INTRODUCTION = (
    "{device}, {day}, seeds {seeds}. Accuracy: mean ± sample standard deviation over the seeds. TFLOPs: training of "
    "the arm, distillation included; the extras are the teacher and the meta model, as far as the arm needs them and "
    "they were trained here."
)


def to_markdown(study: Results) -> str:
    """The study as Markdown."""
    teacher = study["teacher"]
    lines = [f"# Study: {study['name']}", _INTRODUCTION.format(**study, day=study["date"][:10])]
    if teacher and teacher["iid"] is not None:
        lines.append(f"Teacher: {_percent(teacher['iid'])} % IID, {_percent(teacher['ood'])} % OOD.")
    lines += [markdown_table(COLUMNS, rows(study)), "![Accuracy against compute and time](study.png)"]
    if study["comparisons"]:
        lines.append(f"## Compared with {study['baseline']} at equal training compute")
        lines.append("\n".join(f"- {sentence(entry)}" for entry in study["comparisons"]))
        lines.append(
            "Differences are paired by seed, with a 95 % interval (Student's t); if it includes 0, the "
            "two are not told apart."
        )
    return "\n\n".join(lines) + "\n"


def rows(study: Results) -> list[list[str]]:
    """One row per point, in the order of `COLUMNS`."""
    found = []
    for name, curve in study["curves"].items():
        for point in curve["points"]:
            own = list(point["seeds"].values())
            flops = mean_flops(point)
            seconds = [
                statistics.fmean(result[unit] for result in own) for unit in ("train_seconds", "parallel_seconds")
            ]
            found.append(
                [
                    name,
                    _in_words(point["values"]),
                    *(_spread([result[split] for result in own]) for split in ("iid", "ood")),
                    f"{flops / 1e12:.3g}",
                    f"{(flops + point['extra_flops']) / 1e12:.3g}",
                    f"{own[0]['labels']:,}",
                    *(f"{value:,.0f} s" for value in seconds),
                ]
            )
    return found


def _in_words(values: dict[str, Any]) -> str:
    short = {key.replace("training.", "").replace("num_train_", ""): value for key, value in values.items()}
    return ", ".join(f"{key} {value}" for key, value in short.items())


def sentence(entry: Results) -> str:
    """A comparison in one sentence."""
    parts = [f"{split.upper()} {_difference(entry[split])}" for split in ("iid", "ood") if entry[split]]
    how = ", interpolated" if entry["is_interpolated"] else ""
    return (
        f"{entry['curve']} − {entry['baseline']} at {entry['train_flops'] / 1e12:.3g} TFLOPs{how}: {'; '.join(parts)}."
    )


def _difference(judged: Results) -> str:
    mean = f"{100 * judged['mean']:+.1f}".replace("-", "−")
    if judged["interval"] is None:
        return f"{mean} points (one seed: {judged['verdict']})"
    low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in judged["interval"])
    return f"{mean} points [{low}, {high}], {len(judged['differences'])} seeds: {judged['verdict']}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _spread(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    spread = f" ± {100 * statistics.stdev(known):.1f}" if len(known) > 1 else ""
    return f"{100 * statistics.fmean(known):.1f}{spread}"
