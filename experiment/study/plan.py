"""Cost of a study before it starts."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from m2mkd.experiment.phases import phases_of
from m2mkd.experiment.plan.costs import Costs
from m2mkd.experiment.session import Session
from m2mkd.experiment.study.runs import units_and_links
from m2mkd.experiment.study.spec import Point, StudySpec
from m2mkd.screen import Screen


def print_study_plan(spec: StudySpec, points: Sequence[Point], console: Console | None = None) -> None:
    """Print the number of phases by kind and their compute; artifacts that points share count once."""
    console = console or Console(width=None if Console().is_terminal else 140)
    units, _ = units_and_links(points)
    costs = {index: Costs(points[index].recipe, gpus=1) for index in {unit.point for unit in units}}
    flops: dict[str, list[float]] = {}
    for unit in units:
        phase, point = unit.phase, points[unit.point]
        session = Session(point.recipe, costs[unit.point].data, phase.session.seed, Screen())
        total = phase.flops_of(phases_of(session)[phase.name].cost(costs[unit.point]))
        kind = f"arm {point.curve}" if phase.name.startswith("arms/") else phase.name
        flops.setdefault(kind, []).append(total)
    table = Table(title=f"Plan of the study {spec.name}: {len(points)} points, {len(spec.seeds)} seeds")
    for column in ("Phase", "times", "TFLOPs"):
        table.add_column(column, justify="left" if column == "Phase" else "right")
    for kind, values in flops.items():
        table.add_row(kind, str(len(values)), f"{sum(values) / 1e12:,.3g}")
    whole = [value for values in flops.values() for value in values]
    table.add_row("in total", str(len(whole)), f"{sum(whole) / 1e12:,.3g}", style="bold")
    console.print(table)
