"""Writes the report of a study."""

from collections.abc import Sequence
from pathlib import Path

from accelerate import PartialState
from rich.console import Console
from rich.table import Table

from m2mkd.experiment.study.figure import render_figure
from m2mkd.experiment.study.markdown import COLUMNS, rows, sentence, to_markdown
from m2mkd.experiment.study.results import Results, collect_study
from m2mkd.experiment.study.spec import Point, StudySpec
from m2mkd.files import write_files


def report_study(spec: StudySpec, points: Sequence[Point]) -> Path:
    """Write `study.json`, `study.md` and `study.png` into the study's folder, and print its tables."""
    study, folder = collect_study(spec, points), Path(spec.output_dir)
    if PartialState().is_main_process:
        pages = {"study.png": render_figure(study), "study.md": to_markdown(study).encode()}
        write_files(folder, {"study.json": study, **pages})
        print_study(study)
    return folder / "study.md"


def print_study(study: Results, console: Console | None = None) -> None:
    """Print the points and the comparisons; `console` defaults to the terminal."""
    console = console or Console(width=None if Console().is_terminal else 160)
    table = Table(title=study["name"])
    for place, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if place < 2 else "right")
    for row in rows(study):
        table.add_row(*row)
    console.print(table)
    for entry in study["comparisons"]:
        console.print(sentence(entry), markup=False, highlight=False, soft_wrap=True)
