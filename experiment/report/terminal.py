"""Terminal output of the report."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2mkd.experiment.report.markdown import hybrid_caption, hybrid_rows, name_of
from m2mkd.model_cards.tables import COLUMNS, Report, caption_of, comparison_sentence, result_rows


def print_report(report: Report, console: Console | None = None) -> None:
    """Print the table of results and one sentence per comparison; `console` defaults to the terminal."""
    # a log file has no width of its own, and the usual 80 columns would break every cell
    console = console or Console(width=None if Console().is_terminal else 140)
    title = escape(f"{name_of(report)} on {report['device']}")
    table = Table(title=title, caption=caption_of(report), caption_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "Model" else "right", no_wrap=column == "Model")
    for row in result_rows(report):
        table.add_row(*row)
    console.print(table)
    if report.get("hybrids"):
        console.print(_hybrid_table(report))
    for comparison in report["comparisons"]:
        console.print(comparison_sentence(comparison), markup=False, highlight=False, soft_wrap=True)


def _hybrid_table(report: Report) -> Table:
    table = Table(title="Teacher stages inside the meta model", caption=hybrid_caption(report), caption_justify="left")
    columns, rows = hybrid_rows(report)
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
