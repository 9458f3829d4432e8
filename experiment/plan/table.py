"""Terminal output of a plan."""

from rich.console import Console
from rich.table import Table

from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import Plan


COLUMNS = ("Phase", "Trained", "Frozen", "Images", "Epochs", "Batch", "Steps", "GFLOPs/image", "Compute", "GiB/device")
_UNITS = {"EFLOPs": 1e18, "PFLOPs": 1e15, "TFLOPs": 1e12, "GFLOPs": 1e9}


def print_plan(
    plan: Plan, throughput: float, how: str, memory: float | None = None, console: Console | None = None
) -> None:
    """
    Print the phases and the cost of each arm.

    Args:
        plan (`Plan`)
        throughput (`float`): TFLOP/s of one GPU in training.
        how (`str`): Where that number comes from, e.g. `"stated"`.
        memory (`float`, *optional*): GiB of one device, to say what fits.
        console (`Console`, *optional*): Defaults to the terminal.
    """
    console = console or Console(width=None if Console().is_terminal else 140)
    for line in plan.data:
        console.print(line, highlight=False, markup=False)
    gpus = f"{plan.gpus} GPU{'s' * (plan.gpus > 1)}"
    phases = Table(title=f"Plan of {plan.name} on {gpus}", caption=_CAPTION, caption_justify="left")
    for column in COLUMNS:
        phases.add_column(column, justify="left" if column == "Phase" else "right", no_wrap=True)
    if memory is not None:
        phases.add_column(f"Fits {memory:g} GiB", justify="right", no_wrap=True)
    for phase in plan.phases:
        phases.add_row(*_row(phase), *([] if memory is None else [_fit(phase, memory * 2**30)]))
    console.print(phases)
    title = f"In total, at {throughput:g} TFLOP/s per GPU ({how})"
    totals = Table(title=title, caption=_TOTALS_CAPTION, caption_justify="left")
    first = next(iter(plan.totals))
    for column in ("Arm", "Compute", "GPU-hours", f"Hours on {gpus}", f"times {first}"):
        totals.add_column(column, justify="left" if column == "Arm" else "right")
    for name, flops in plan.totals.items():
        hours = flops / (throughput * 1e12) / 3600
        ratio = f"{flops / plan.totals[first]:.2f}"
        totals.add_row(name, flops_in_words(flops), _number(hours), _number(hours / plan.gpus), ratio)
    console.print(totals)
    paths = Table(title=f"Wall-clock on {gpus}, from nothing", caption=_PATHS_CAPTION, caption_justify="left")
    for column in ("Arm", "Hours", "Path"):
        paths.add_column(column, justify="right" if column == "Hours" else "left")
    for name, path in plan.paths.items():
        steps = {phase: flops / (throughput * 1e12) / 3600 for phase, flops in path.items()}
        way = " → ".join(f"{phase} {_number(hours)}" for phase, hours in steps.items())
        paths.add_row(name, _number(sum(steps.values())), way)
    console.print(paths)


_CAPTION = (
    "Trained and frozen: parameters. Each pair is planned alone, in its own process; `pairs` trains all of them in "
    "one process, with one pass through the meta model. GiB/device: weights, gradients, AdamW and the activations of "
    "one device batch; fused attention and grouped experts are assumed. Fits: or the largest device batch that does."
)
_PATHS_CAPTION = (
    "The pairs side by side, each on devices of its own; the devices share every other phase. Without evaluation, "
    "data and communication."
)
_TOTALS_CAPTION = "FLOPs of forward and backward passes in training, without evaluation, data and communication."


def _row(phase: PhaseCost) -> list[str]:
    millions = [f"{number / 1e6:,.1f} M" for number in (phase.parameters, phase.frozen)]
    counts = [f"{phase.images:,}", f"{phase.epochs:,.4g}", f"{phase.batch:,}", f"{phase.steps:,}"]
    work = [f"{phase.flops_per_image / 1e9:,.4g}", flops_in_words(phase.flops), _number(phase.memory / 2**30)]
    return [phase.name, *millions, *counts, *work]


def _fit(phase: PhaseCost, memory: float) -> str:
    if phase.memory <= memory:
        return "yes"
    largest = phase.largest_batch(memory)
    return f"batch {largest:,}" if largest else "no"


def flops_in_words(value: float) -> str:
    """Format FLOPs in the largest unit in which the value is at least one, otherwise in the smallest unit."""
    name = next((name for name, unit in _UNITS.items() if value >= unit), "GFLOPs")
    return f"{_number(value / _UNITS[name])} {name}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
