"""Terminal output of the evaluation of a saved model."""

from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Column, Table


def show(results: dict[str, dict[str, Any]], console: Console, per_class: bool) -> None:
    """Print the results as a table, and with `per_class` a table of the classes of each set, worst first."""
    columns = {
        "accuracy": "acc. %",
        "top5_accuracy": "top-5 %",
        "accuracy_gap": "gap",
        "effective_robustness": "eff. rob.",
    }
    shown = [name for name in columns if any(name in result for result in results.values())]
    # the source of a set may be a long path: it is wrapped, the figures are not
    table = Table(Column("data", overflow="fold"), box=SIMPLE)
    for name in (*(columns[name] for name in shown), "loss", "images", "classes", "left out"):
        table.add_column(name, justify="right", no_wrap=True)
    for source, result in results.items():
        shares = [f"{100 * result[name]:.2f}" if name in result else "" for name in shown]
        counts = [f"{result[name]:,}" for name in ("n", "classes", "left_out")]
        table.add_row(source, *shares, f"{result['loss']:.4f}", *counts)
    console.print(table)
    for source, result in results.items() if per_class else ():
        classes = Table("class", "acc. %", "images", title=source, box=SIMPLE)
        for name, row in sorted(result["per_class"].items(), key=lambda item: item[1]["accuracy"]):
            classes.add_row(name, f"{100 * row['accuracy']:.2f}", str(row["n"]))
        console.print(classes)
