"""The report as one HTML file: no script, no other file, no network."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

import yaml
from jinja2 import Environment
from matplotlib import colormaps
from matplotlib.colors import to_hex

from m2mkd.experiment.report.chart import Chart, Series
from m2mkd.experiment.report.collect import Histories
from m2mkd.experiment.report.figure import arm_curves, colors_of, main_load, pair_curves
from m2mkd.experiment.report.markdown import hybrid_caption, hybrid_rows, name_of
from m2mkd.experiment.report.pictures import png_uri
from m2mkd.model_cards.tables import (
    COLUMNS,
    COST_COLUMNS,
    Report,
    caption_of,
    comparison_sentence,
    compute_notes,
    cost_rows,
    result_rows,
)


def to_html(report: Report, histories: Histories, graph: bytes | None, shown: Mapping[str, Any]) -> str:
    """
    Render the report as a page.

    Args:
        report (`dict[str, Any]`): From `collect`, or read from report.json.
        histories (`dict`): From `read_histories`.
        graph (`bytes`, *optional*): PNG of a NAC's graph.
        shown (`Mapping[str, Any]`): `arm`, and of its images `routing` and `worst`, see
            [`~m2mkd.experiment.report.pictures.ShownImages`]; or `missing`, why there are none. Empty: no images.
    """
    page = resources.files("m2mkd.experiment.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    template = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(page)
    return template.render(
        report=report,
        title=name_of(report),
        tables={
            "results": (COLUMNS, result_rows(report)),
            "cost": (COST_COLUMNS, cost_rows(report)),
            "hybrids": hybrid_rows(report) if report.get("hybrids") else None,
        },
        caption=caption_of(report),
        sentences=[comparison_sentence(comparison) for comparison in report["comparisons"]],
        hybrids=hybrid_caption(report) if report.get("hybrids") else "",
        frontier=_frontier(report),
        curves=_curves(report, histories),
        load=main_load(report),
        graph=None if graph is None else png_uri(graph),
        shown=shown,
        notes=compute_notes(report),
        recipe=yaml.safe_dump(report["recipe"], sort_keys=False, allow_unicode=True),
    )


def _frontier(report: Report) -> list[Chart]:
    """Accuracy of each arm against the compute of its training, by test set."""
    color, charts, teacher = colors_of(report), [], report["teacher"] or {}
    for split in ("iid", "ood"):
        series = [
            Series(
                arm,
                color[arm],
                [(report["arms"][arm]["train_flops"] / 1e12, 100 * summary[split]["mean"])],
                spread=100 * (summary[split]["std"] or 0),
                is_line=False,
            )
            for arm, summary in report["summary"].items()
            if summary[split]
        ]
        if series:
            level = ("teacher", 100 * teacher[split]["accuracy"]) if teacher.get(split) else None
            title = f"{split.upper()} accuracy and training compute"
            charts.append(Chart(title, "TFLOPs of training", "accuracy (%)", series, level))
    return charts


def _curves(report: Report, histories: Histories) -> list[Chart]:
    """Accuracy during the end-to-end phase of each arm, and what was measured during the distillation of the pairs."""
    color, charts = colors_of(report), []
    lines = [
        Series(
            arm,
            color[arm],
            list(zip(*points, strict=True)),
            is_dashed=report["arms"][arm]["arm"]["budget"] is not None,
            is_titled=place == 0,
        )
        for arm, seeds in arm_curves(report, histories).items()
        for place, points in enumerate(seeds.values())
    ]
    if lines:
        x_label = "TFLOPs, with those before this phase"
        charts.append(Chart("End-to-end training", x_label, "IID accuracy (%)", lines))
    pairs, kind = pair_curves(histories)
    if pairs:
        shades = colormaps["viridis"].resampled(len(pairs) + 2)
        lines = [
            Series(f"pair {index}", to_hex(shades(place + 1)), list(zip(*points, strict=True)))
            for place, (index, points) in enumerate(pairs.items())
        ]
        charts.append(Chart("Distillation of the pairs", "epochs", f"{kind} (%)", lines))
    return charts
