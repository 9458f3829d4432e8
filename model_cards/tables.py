"""Results of a report as text and Markdown tables, for the report itself and for model cards."""

from collections.abc import Sequence
from typing import Any


COLUMNS = ("Model", "IID %", "OOD %", "End-to-end epochs", "Images", "Labels", "Train time", "Parameters", "TFLOPs")
COST_COLUMNS = (
    *("Model", "Images", "Labels", "Samples seen", "Train time", "TFLOPs", "Extra", "TFLOPs with the extra"),
    *("Time, one device per pair", "Peak memory"),
)
# A comparison warns if the budgets differ by more than this fraction.
BUDGET_TOLERANCE = 0.05
_NETWORKS = {"teacher": "the teacher", "meta": "the meta model"}
Result = dict[str, Any]
Report = dict[str, Any]


def comparison_sentence(comparison: dict[str, Any]) -> str:
    """
    Describe a comparison in one sentence. A difference is called clear if it is more than one standard deviation away
    from 0 and has the same sign with every seed.
    """
    arm, baseline = comparison["arm"], comparison["baseline"]
    splits = [(name, comparison[name.lower()]) for name in ("IID", "OOD") if comparison[name.lower()] is not None]
    parts = [f"{name} {_difference(split)}, {_verdict(split, arm)}" for name, split in splits]
    ratio = 1 if comparison["budget_ratio"] is None else comparison["budget_ratio"]
    beware = f" Note: the budgets are not equal; {baseline} had {ratio:.3g} times that of {arm}."
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
    """Accuracy in %, over the seeds if there are several, with a note if an arm has fewer seeds than the report."""
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
    """Epochs of end-to-end training; for an incubated teacher, those of its fine-tuning."""
    return f"{result.get('phases', {}).get('finetuning', result)['epochs']:.4g}"


def _results(report: Report) -> dict[str, Result]:
    """Teacher, meta model and arms of the first seed, as far as they exist, in the order of the tables."""
    results = {"teacher": report["teacher"], "meta": report["meta"], **report["arms"]}
    return {name: result for name, result in results.items() if result is not None}


def result_rows(report: Report) -> list[list[str]]:
    """Results and cost of each network and arm, in the order of `COLUMNS`."""
    rows = []
    for name, result in _results(report).items():
        scores = [_accuracy(report, name, result, split) for split in ("iid", "ood")]
        seen = [_epochs(result), f"{result['images']:,}", f"{result['labels']:,}", _seconds(result["train_seconds"])]
        rows.append([name, *scores, *seen, _parameters(result["parameters"]), _tflops(result["train_flops"])])
    return rows


def caption_of(report: Report) -> str:
    """Caption of the table of results."""
    seeds, caption = list(report["seeds"]), "Images and labels: distinct ones of the training sets."
    if len(seeds) > 1:
        caption = (
            f"Accuracy of the arms: mean ± sample standard deviation over the seeds {', '.join(seeds)}; teacher and "
            f"meta model are shared by all seeds. The other columns are for seed {report['seed']}. {caption}"
        )
    modular = [name for name, result in report["arms"].items() if result["arm"]["init"] == "modules"]
    if modular:
        names = " and ".join(modular)
        caption += f" Train time, TFLOPs, images and labels of {names} include the distillation."
    return caption


def cost_rows(report: Report) -> list[list[str]]:
    """Images and cost of each network and arm and of their phases; for arms also with the networks they need."""
    rows = []
    for name, result in _results(report).items():
        extra = {network: report[network] for network in result.get("arm", {}).get("extra", ())}
        known = [network for network, own in extra.items() if not own.get("pretrained")]
        total = result["train_flops"] + sum(extra[network]["train_flops"] for network in known)
        names = [network if network in known else f"{network} (pretrained, not counted)" for network in extra]
        own = [_seconds(result.get("parallel_seconds") or result["train_seconds"]), _gib(result.get("peak_memory"))]
        rows.append([name, *_costs(result), ", ".join(names) or "–", _tflops(total) if "arm" in result else "–", *own])
        for phase, costs in result.get("phases", {}).items():
            rows.append([f"– of it {phase}", *_costs(costs), *[""] * 4])
    return rows


def _gib(number: float | None) -> str:
    """Peak memory of the largest process, which was not recorded by earlier versions."""
    return "–" if number is None else f"{number / 2**30:.2f} GiB"


def _costs(costs: Result) -> list[str]:
    counts = [f"{costs[name]:,}" for name in ("images", "labels", "train_samples_seen")]
    return [*counts, _seconds(costs["train_seconds"]), _tflops(costs["train_flops"])]


def compute_notes(report: Report) -> list[str]:
    """What the compute of each arm covers and what it leaves out, in points."""
    notes = []
    for name, result in report["arms"].items():
        arm = result["arm"]
        if same := result.get("same_as"):
            spent = arm["budget"]["flops_of"]
            notes.append(f"{name}: the model of {same}, whose end-to-end epochs take {spent}'s FLOPs or more.")
            continue
        needs = [_NETWORKS[network] for network in arm["extra"] if not report[network].get("pretrained")]
        extra = "The teacher was pretrained." if arm["extra"] else "It needs no other network."
        if needs:
            extra = f"Training {' and '.join(needs)} is extra."
        notes.append(f"{name}: {arm['covers']}. {extra}")
    teacher = report["teacher"] or {}
    if teacher.get("pretrained"):
        notes.append(f"{teacher_text(teacher)} Its training is not counted.")
    elif teacher.get("network"):
        notes.append(f"{teacher_text(teacher)} The pretraining is not counted.")
    if "incubation" in teacher.get("phases", {}):
        notes.append(
            "The teacher itself was incubated inside the meta model; its row leaves out the training of that model."
        )
    return notes


def teacher_hub_id(teacher: Result) -> str | None:
    """The Hub id of a report's teacher; `None` if it was trained in the run or loaded from a folder."""
    network = teacher.get("network")
    return None if network is None or network["folder"] is not None else teacher["pretrained"]


def teacher_text(teacher: Result) -> str:
    """What the teacher of a report is and where its weights came from, in sentences."""
    size, source, network = f"{teacher['parameters']:,} parameters", teacher.get("pretrained"), teacher.get("network")
    if source is None and network is not None:
        where = (
            f"{network['id']} from the Hub" if network["folder"] is None else f'a folder named "{network["folder"]}"'
        )
        return (
            f"The teacher is a {network['class']} with {size}. Its backbone is that of {where}, pretrained elsewhere; "
            "only its linear head was fitted in this run, to the labels of its training set."
        )
    if source is None:
        is_incubated = "incubation" in teacher.get("phases", {})
        how = "incubated inside the meta model and then fine-tuned" if is_incubated else "trained"
        return f"The teacher has {size}. It was {how} in this run."
    if network is None:  # tested before this was recorded
        return f"The teacher is a pretrained network with {size}. It was not trained in this run."
    width = network["hidden_size"]
    layers = "" if width is None else f"{network['num_hidden_layers']} layers of width {width} and "
    what = f"{network['class']} with {layers}{size}"
    if network["folder"] is None:
        return f"The teacher is {source} from the Hub, a {what}. It was not trained in this run."
    return (
        f'The teacher is a {what}, loaded from a local folder named "{network["folder"]}". It was not trained in this '
        "run, and where its weights came from is not recorded."
    )


def markdown_table(header: Sequence[str], rows: list[list[str]]) -> str:
    """Render a GitHub table; all columns except the first are right-aligned."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, rule, *rows])


def results_section(report: Report) -> str:
    """Render the results as Markdown: the table, its caption, and the comparisons as text."""
    sentences = "\n".join(f"- {comparison_sentence(comparison)}" for comparison in report["comparisons"])
    parts = [markdown_table(COLUMNS, result_rows(report)), caption_of(report), sentences]
    return "\n\n".join(part for part in parts if part)


def compute_section(report: Report) -> str:
    """Render the cost of the networks as Markdown: the table, and what it covers."""
    covers = f"What the compute of each arm covers (the table is for seed {report['seed']}):"
    notes = "\n".join(f"- {note}" for note in compute_notes(report))
    return "\n\n".join([markdown_table(COST_COLUMNS, cost_rows(report)), covers, notes])
