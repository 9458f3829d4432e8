"""The report as Markdown."""

import yaml

from m2mkd.model_cards.tables import Report, compute_section, markdown_table, results_section


_HYBRID_COLUMNS = {"before": "Before alignment %", "after": "When distilled %"}


def name_of(report: Report) -> str:
    """Name of the run in the recipe."""
    return str(report["recipe"].get("name") or "a run without a name")


def to_markdown(report: Report) -> str:
    """Render the report as GitHub Markdown; it shows report.png from the same folder."""
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    sections = [
        f"# {name_of(report)}",
        f"Seeds {', '.join(report['seeds'])} · {report['device']} · {versions} · {report.get('date') or 'undated'}",
        "## Results",
        results_section(report),
        _hybrid_section(report),
        "![Accuracy and training curves](report.png)",
        _graph_section(report),
        "## Training data and compute",
        compute_section(report),
        "## Reproduce",
        "Save this as `recipe.yaml` and run `m2mkd run recipe.yaml`, or `accelerate launch train.py recipe.yaml`:",
        f"```yaml\n{yaml.safe_dump(report['recipe'], sort_keys=False, allow_unicode=True)}```",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _hybrid_section(report: Report) -> str:
    """Section about the hybrids that the pairs were distilled from; empty if no pair was distilled from a teacher."""
    if not report.get("hybrids"):
        return ""
    table = markdown_table(*hybrid_rows(report))
    return f"## Teacher stages inside the meta model\n\n{table}\n\n{hybrid_caption(report)}"


def _graph_section(report: Report) -> str:
    """Section about the graph of a NAC; empty for other students."""
    if not report.get("graph_density"):
        return ""
    shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in report["graph_density"].items())
    return (
        "## Graph\n\nFraction of the mediators' pairs that the truncated kernel of their signatures connects: "
        f"{shares}.\n\n![Signature-kernel adjacency before and after training](graph.png)"
    )


def hybrid_rows(report: Report) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the hybrids' table: accuracy of the meta model with one teacher stage in it, if measured."""
    stages = report["hybrids"]["stages"]
    measured = [
        when for when in _HYBRID_COLUMNS if any(accuracies[when] is not None for accuracies in stages.values())
    ]
    rows = []
    for index, accuracies in stages.items():
        values = [accuracies[when] for when in measured]
        rows.append([index, *("–" if value is None else f"{100 * value:.1f}" for value in values)])
    return ["Teacher stage", *(_HYBRID_COLUMNS[when] for when in measured)], rows


def hybrid_caption(report: Report) -> str:
    """Caption of the hybrids' table."""
    hybrids = report["hybrids"]
    return (
        f"Accuracy of the meta model with one teacher stage in it, whose logits the pairs are distilled from "
        f"({hybrids['n']:,} images, {hybrids['set']}). The teacher's own: {100 * hybrids['teacher']:.1f} %; chance: "
        f"{100 * hybrids['chance']:.1f} %."
    )
