"""The report of a run: the results of its phases as JSON, Markdown, figures and a page."""

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from accelerate import PartialState

from m2mkd.distillation.split import stage_class_of_type
from m2mkd.errors import DataError
from m2mkd.evaluation.graph import density, draw_graphs, read_graphs
from m2mkd.experiment.machine import device_in_words
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.report.cards import write_cards
from m2mkd.experiment.report.collect import Histories, Report, collect, plain, read_histories
from m2mkd.experiment.report.figure import render_figure
from m2mkd.experiment.report.html import to_html
from m2mkd.experiment.report.markdown import to_markdown
from m2mkd.experiment.report.pictures import ShownImages
from m2mkd.experiment.report.read import main_arm
from m2mkd.experiment.report.terminal import print_report
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.files import write_files


def make_report(recipe: Recipe) -> Path:
    """
    Write `report.json`, `report.md`, `report.png` and `report.html` from the folders of a finished run, and the model
    card of each arm into its folder. Returns the path of `report.md`.
    """
    folder = RunFolder(recipe.output_dir, recipe.seed)
    if PartialState().is_main_process:
        content = recipe.model_dump(mode="json")
        report = collect(folder.path, content, recipe.seed, recipe.repeat_seeds, device_in_words(recipe))
        graph = None
        if stage_class_of_type(recipe.student.model.model_type).has_graph:
            arms = {arm: folder.arm(arm, recipe.seed) for arm in report["arms"]}
            affinities = read_graphs(arms, recipe.student.depths, recipe.seed)
            report["graph_density"] = {name: density(affinity) for name, affinity in affinities.items()}
            graph = draw_graphs(affinities)
        arm = main_arm(report)
        try:
            images = ShownImages(recipe.data[recipe.evaluation.iid], folder.arm(arm, recipe.seed))
            shown: dict[str, Any] = {"arm": arm, "routing": images.routing(), "worst": images.worst()}
        except DataError as error:
            # the other sections do not need the data, which may be on another machine
            shown = {"missing": str(error)}
        write_report(folder.path, report, read_histories(folder.path, recipe.seed, recipe.repeat_seeds), graph, shown)
        write_cards(folder.path)
        print_report(report)
    PartialState().wait_for_everyone()
    return folder.report("md")


def write_report(
    output_dir: Path,
    report: Report,
    histories: Histories,
    graph: bytes | None = None,
    shown: Mapping[str, Any] = MappingProxyType({}),
) -> Path:
    """
    Write report.json, report.md, report.png and report.html, and for a NAC graph.png, into `output_dir`, each whole or
    not at all.

    Args:
        output_dir (`Path`): The run's folder; created if it does not exist.
        report (`dict[str, Any]`): From `collect`, or read from report.json.
        histories (`dict`): From `read_histories`; `{}` leaves the training curves out.
        graph (`bytes`, *optional*): Figure of a NAC's graph.
        shown (`Mapping`): Test images in report.html, see [`~m2mkd.experiment.report.html.to_html`].

    Returns:
        The path of report.md.
    """
    report = plain(report)
    contents = {
        "report.json": report,
        "report.png": render_figure(report, histories),
        "report.md": to_markdown(report).encode(),
        "report.html": to_html(report, histories, graph, shown).encode(),
        **({} if graph is None else {"graph.png": graph}),
    }
    write_files(Path(output_dir), contents)
    return Path(output_dir) / "report.md"
