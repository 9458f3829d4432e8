"""The figures of README and docs/results.md that come from the committed studies, as they write them."""

import json
import statistics
from pathlib import Path
from typing import Any


STUDIES = Path(__file__).resolve().parents[1] / "docs" / "studies"
PASSES = (
    "distill.training.num_train_epochs",
    "upcycle.training.num_train_epochs",
    "finetune.training.num_train_epochs",
)


def read(name: str) -> dict[str, Any]:
    return json.loads((STUDIES / name / "study.json").read_text())


def accuracies(point: dict[str, Any]) -> list[str]:
    """IID and OOD: mean ± standard deviation in %."""
    columns = [[100 * own[split] for own in point["seeds"].values()] for split in ("iid", "ood")]
    return [f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}" for values in columns]


def passes(point: dict[str, Any]) -> str:
    return " + ".join(str(point["values"][key]) for key in PASSES if point["values"].get(key))


def row(name: str, point: dict[str, Any]) -> str:
    own = list(point["seeds"].values())
    tera = statistics.fmean(result["train_flops"] for result in own) / 1e12
    return f"| `{name}` | {passes(point)} | {' | '.join(accuracies(point))} | {tera:.2f} | {own[0]['labels']:,} |"


def rows(name: str) -> list[str]:
    """The rows of the table of a study in docs/results.md."""
    header = ["| arm | passes | IID % | OOD % | TFLOPs | labels |", "|---|---|---:|---:|---:|---:|"]
    return header + [row(arm, point) for arm, curve in read(name)["curves"].items() for point in curve["points"]]


def short(name: str, arm: str, number: str) -> str:
    """The accuracies of one point, of a number of passes."""
    point = next(point for point in read(name)["curves"][arm]["points"] if passes(point) == number)
    iid, ood = (text.split(" ")[0] for text in accuracies(point))
    return f"{iid} / {ood}"


def difference(name: str, arm: str, number: str, split: str) -> str:
    """The difference of one point from the baseline, with its interval."""
    entry = next(e for e in read(name)["comparisons"] if e["curve"] == arm and passes(e) == number)[split]
    mean, low, high = (f"{100 * value:+.1f}".replace("-", "−") for value in (entry["mean"], *entry["interval"]))
    return f"{mean} [{low}, {high}]"


def _largest_deficit(name: str, arms: tuple[str, ...]) -> float:
    entries = [entry for entry in read(name)["comparisons"] if entry["curve"] in arms]
    return max(0.0, *(-100 * entry[split]["mean"] for entry in entries for split in ("iid", "ood")))


def facts(page: str) -> list[str]:
    """The figures in the text of README.md or docs/results.md."""
    v, n, ten, g = "vmoe_digits", "nac_digits", "nac_digits_again", "vmoe_glyphs"
    d = "vmoe_digits_deep"
    if page == "README.md":
        return [
            f"{difference(v, 'm2mkd_kd', '5 + 15', 'iid')} points IID",
            f"{difference(v, 'm2mkd_kd', '5 + 15', 'ood')} OOD",
            f"V-MoE, 40 epochs: {short(v, 'e2e_all', '40')}, `kd` with 40 passes: {short(v, 'kd', '40')}",
            f"V-MoE, 20 passes: {short(v, 'm2mkd_kd_own', '5 + 15')}, `kd`: {short(v, 'kd', '20')}",
            f"NAC, 10 passes: {short(ten, 'm2mkd_kd', '3 + 7')}, `kd`: {short(ten, 'kd', '10')}",
            f"letters, 10 passes: {short(g, 'm2mkd_kd', '3 + 7')}, `kd`: {short(g, 'kd', '10')}",
            f"{difference(g, 'm2mkd_kd', '3 + 7', 'iid')} and {difference(g, 'm2mkd_kd', '3 + 7', 'ood')}",
            f"{difference(ten, 'm2mkd_kd', '3 + 7', 'iid')} and {difference(ten, 'm2mkd_kd', '3 + 7', 'ood')}",
            f"{difference(d, 'm2mkd_kd', '1 + 1', 'iid')} and {difference(d, 'm2mkd_kd', '1 + 1', 'ood')}",
            f"modules alone: {short(v, 'modules_only', '20')}",
            f"10 + 10 passes: {short(v, 'upcycle_kd', '10 + 10')}",
        ]
    return [
        f"at most {_largest_deficit(v, ('m2mkd_kd', 'm2mkd_kd_own')):.1f} points behind in the mean",
        difference(v, "m2mkd_kd_own", "5 + 15", "ood"),
        f"{difference(v, 'm2mkd_kd', '5 + 15', 'iid')} IID and {difference(v, 'm2mkd_kd', '5 + 15', 'ood')} OOD",
        f"{difference(v, 'modules_only', '20', 'iid')} IID, {difference(v, 'modules_only', '20', 'ood')} OOD",
        f"{difference(n, 'm2mkd_kd', '3 + 7', 'iid')} points IID and {difference(n, 'm2mkd_kd', '3 + 7', 'ood')}",
        f"{difference(n, 'm2mkd_kd', '5 + 15', 'iid')} and {difference(n, 'm2mkd_kd', '5 + 15', 'ood')}",
        f"{difference(ten, 'm2mkd_kd', '3 + 7', 'iid')} points IID and {difference(ten, 'm2mkd_kd', '3 + 7', 'ood')}",
        f"{difference(d, 'm2mkd_kd', '3 + 7', 'iid')} points IID and {difference(d, 'm2mkd_kd', '3 + 7', 'ood')}",
        f"{difference(d, 'm2mkd_kd', '5 + 15', 'iid')} and {difference(d, 'm2mkd_kd', '5 + 15', 'ood')}",
        f"{difference(d, 'm2mkd_kd', '1 + 1', 'iid')} and {difference(d, 'm2mkd_kd', '1 + 1', 'ood')}",
        f"{difference(g, 'm2mkd_kd', '1 + 4', 'iid')} points IID and {difference(g, 'm2mkd_kd', '1 + 4', 'ood')} OOD",
        f"{difference(g, 'm2mkd_kd', '3 + 7', 'iid')} and {difference(g, 'm2mkd_kd', '3 + 7', 'ood')}",
        f"{difference(g, 'm2mkd_kd', '5 + 15', 'iid')} and {difference(g, 'm2mkd_kd', '5 + 15', 'ood')}",
    ]
