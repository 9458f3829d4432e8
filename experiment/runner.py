"""Runs a recipe: each phase once, into its own folder; finished phases are skipped."""

from functools import partial
from pathlib import Path

import transformers

from m2mkd.errors import RunError, WriteError
from m2mkd.experiment.check import check_arguments
from m2mkd.experiment.claim import claim_folder
from m2mkd.experiment.engines.local import Task, run_tasks
from m2mkd.experiment.machine import num_processes, use_all_cores
from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_networks import RecipeNetworks
from m2mkd.experiment.report import make_report
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


def run(recipe: Recipe) -> Path | None:
    """
    Run all phases of a recipe that are not finished yet.

    Args:
        recipe (`Recipe`)

    Returns:
        Path of the report (`report.md`); `None` if pairs that other processes train are still missing.

    Raises:
        `RunError`: the folder has a run of another recipe, or cannot be written.
    """
    try:
        return _run(recipe)
    except WriteError as error:
        raise RunError(f"{error} Finished phases are kept.") from error


def _run(recipe: Recipe) -> Path | None:
    quieten()
    use_all_cores()
    processes = num_processes(recipe)
    data, screen = RunData(recipe), Screen()
    data.check()
    for line in data.describe():
        screen.say(line)
    phases = _all_phases(recipe, data, screen)
    RecipeNetworks(recipe, data.class_names)
    check_arguments(phases)
    claim_folder(recipe)
    for phase in phases:
        if phase.is_finished():
            screen.say(f"{phase.title}: finished, skipped")
    work = partial(_work, recipe, data)
    if shared_out := [phase for phase in phases if phase.missing()]:
        # other processes run the remaining parts; the one that finds all parts goes on
        run_tasks(_tasks(_with_what_they_read(shared_out, phases), phases), work, processes)
        for phase in shared_out:
            if missing := phase.missing():
                phase.session.say(
                    f"{phase.name} {missing} are not distilled yet: set distill.pairs to them and run the recipe again"
                )
        if any(phase.missing() for phase in shared_out):
            return None
    run_tasks(_tasks(phases, phases), work, processes)
    return make_report(recipe)


def _all_phases(recipe: Recipe, data: RunData, screen: Screen) -> list[Phase]:
    """The phases of all seeds; phases that the seeds share are those of the first seed."""
    phases: dict[str, Phase] = {}
    for seed in [recipe.seed, *recipe.repeat_seeds]:
        for phase in phases_of(Session(recipe, data, seed, screen)).values():
            phases.setdefault(phase.title, phase)
    return list(phases.values())


def _read_by(phase: Phase, phases: list[Phase]) -> list[Phase]:
    """The phases whose artifacts a phase reads."""
    return [
        other
        for other in phases
        if other.name in phase.reads and (other.is_shared or other.session.seed == phase.session.seed)
    ]


def _with_what_they_read(chosen: list[Phase], phases: list[Phase]) -> list[Phase]:
    needed = [other for phase in chosen for other in _with_what_they_read(_read_by(phase, phases), phases)]
    return [phase for phase in phases if phase in chosen or phase in needed]


def _tasks(chosen: list[Phase], phases: list[Phase]) -> list[Task]:
    """Tasks for the unfinished phases: first those that others wait for; otherwise seed by seed."""
    return [
        Task(
            phase.title,
            (phase.session.seed, phase.name),
            tuple(other.title for other in _read_by(phase, phases)),
        )
        for phase in sorted(chosen, key=lambda phase: phase.rank)
        if not phase.is_finished()
    ]


def _work(recipe: Recipe, data: RunData, screen: Screen, seed: int, name: str) -> None:
    """Run one phase, in this process or in a worker."""
    quieten()
    phases_of(Session(recipe, data, seed, screen))[name].run()


def quieten() -> None:
    """Silence transformers, whose messages a run repeats in its own words where they matter."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
