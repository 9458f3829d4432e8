"""Minutes that the phases of a run are expected to take, from a few measured steps of its networks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from m2mkd.experiment.engines.task import Task
from m2mkd.experiment.flops import training_flops_per_image
from m2mkd.experiment.phases import Phase
from m2mkd.experiment.plan.costs import PhaseCost
from m2mkd.experiment.plan.plan import make_plan
from m2mkd.experiment.plan.table import flops_in_words
from m2mkd.experiment.recipe import NetworkSpec
from m2mkd.experiment.session import NO_TEACHER, Session
from m2mkd.screen import in_words


# Of each network, after a first step.
MEASURED_SECONDS = 0.5


@dataclass(frozen=True)
class Expected:
    """
    What an unfinished phase is expected to take.

    Args:
        costs (`list[PhaseCost]`): Its trainings.
        seconds (`float`): Training time, without evaluations.
    """

    costs: list[PhaseCost]
    seconds: float


def expect(phases: Sequence[Phase], processes: int) -> dict[str, Expected]:
    """
    Measure steps of the student and of the teacher on the recipe's images, and compute the time of phases from their
    FLOPs. Not in a group of processes that train together: they would measure different numbers of steps, and wait.

    Args:
        phases (`Sequence[Phase]`): Phases of one recipe, of any seeds.
        processes (`int`): Phases at once, which share the threads.

    Returns:
        `dict[str, Expected]`: By title of the phase.
    """
    session, recipe = phases[0].session, phases[0].recipe
    plan = make_plan(recipe, 1)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads // processes, 1))
    try:
        data = recipe.data_of(next(iter(recipe.all_arms.values())))
        student = measure_pace(session, recipe.student.model, session.depths, data)
        own = recipe.teacher
        teacher = student if own.model is None else measure_pace(session, own.model, own.depths, own.data)
    finally:
        torch.set_num_threads(threads)
    expected = {}
    for phase in phases:
        costs = phase.costs_of_own(plan.parts[phase.name])
        pace = student if "student" in phase.sections else teacher
        seconds = sum(cost.flops for cost in costs) / pace
        expected[phase.title] = Expected(costs, seconds)
    return expected


def measure_pace(session: Session, spec: NetworkSpec, depths: list[int], data: str) -> float:
    """
    Measure the FLOP/s of training a network end to end with the recipe's batches: images, forward and backward pass.

    Args:
        session (`Session`)
        spec (`NetworkSpec`): The network; its weights are random.
        depths (`list[int]`): Layers of its stages.
        data (`str`): Name of the training set.
    """
    network = session.new_network(spec, data, depths, session.seed)
    with TemporaryDirectory() as folder:
        trainer = session.trainer(session.arguments(Path(folder), {}, NO_TEACHER), data, network)
    flops, batch_size = training_flops_per_image(trainer, [network]), trainer.args.per_device_train_batch_size
    samples = cycle(trainer.train_dataset)

    def step() -> None:
        batch = trainer.data_collator(list(islice(samples, batch_size)))
        batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
        with trainer.accelerator.autocast():
            loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    step()
    steps, start = 0, time.perf_counter()
    while steps == 0 or time.perf_counter() - start < MEASURED_SECONDS:
        step()
        steps += 1
    return flops * batch_size * steps / (time.perf_counter() - start)


def wall_clock(tasks: Sequence[Task], seconds: Mapping[str, float], processes: int) -> float:
    """
    Seconds until all tasks are done, if each starts as soon as a process is free and what it waits for is done.

    Args:
        tasks (`Sequence[Task]`): Of several that could start, the first does.
        seconds (`Mapping[str, float]`): By name of the task.
        processes (`int`): Tasks at once.
    """
    names, waiting, free = {task.name for task in tasks}, list(tasks), [0.0] * processes
    ends: dict[str, float] = {}
    while waiting:
        ready = [task for task in waiting if all(name in ends for name in names.intersection(task.after))]
        starts = [max([min(free), *(ends.get(name, 0.0) for name in task.after)]) for task in ready]
        start, task = min(starts), ready[starts.index(min(starts))]
        waiting.remove(task)
        free.remove(min(free))
        ends[task.name] = start + seconds[task.name]
        free.append(ends[task.name])
    return max(ends.values(), default=0.0)


def print_expected(expected: Mapping[str, Expected], total: float, processes: int) -> None:
    """
    Print a table of the phases that are about to run.

    Args:
        expected (`Mapping[str, Expected]`): From [`expect`].
        total (`float`): Seconds until all are done.
        processes (`int`): Phases at once.
    """
    at_once = f", up to {processes} phases at once" if processes > 1 else ""
    title = f"To run: about {in_words(total)}, from steps measured now{at_once}"
    table = Table(title=title, title_justify="left", caption="Evaluations come on top.", caption_justify="left")
    for column in ("Phase", "Images", "Epochs", "Steps", "Compute", "Time"):
        table.add_column(column, justify="left" if column == "Phase" else "right", no_wrap=True)
    for name, own in expected.items():
        images = max(cost.images for cost in own.costs)
        epochs, steps = (sum(getattr(cost, what) for cost in own.costs) for what in ("epochs", "steps"))
        compute = flops_in_words(sum(cost.flops for cost in own.costs))
        table.add_row(escape(name), f"{images:,}", f"{epochs:,.4g}", f"{steps:,}", compute, in_words(own.seconds))
    Console().print(table)
