"""Runs a recipe: each phase once, into its own folder; finished phases are skipped."""

from functools import partial
from pathlib import Path

import transformers
from accelerate import PartialState

from m2mkd.errors import RecipeError, RunError, WriteError
from m2mkd.experiment.artifact import CHECKPOINT, TRAIN_RESULTS, is_finished
from m2mkd.experiment.check import check_arguments
from m2mkd.experiment.claim import claim_folder, remove_leftovers
from m2mkd.experiment.engines import local, run_tasks
from m2mkd.experiment.engines.task import Task
from m2mkd.experiment.machine import num_processes, use_all_cores
from m2mkd.experiment.one_writer import one_writer
from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.plan.expected import expect, print_expected, wall_clock
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_networks import RecipeNetworks
from m2mkd.experiment.report import make_report
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.experiment.session import Session
from m2mkd.screen import Screen


def run(
    recipe: Recipe, phase: str | None = None, take_over: bool = False, shows_expected: bool = False
) -> Path | None:
    """
    Run all phases of a recipe that are not finished yet, or one of them.

    Args:
        recipe (`Recipe`)
        phase (`str`, *optional*): Run only this phase, named as its artifact in the run's folder: `"meta"`,
            `"pairs/3"`, `"arms/kd"`, `"seeds/5/arms/kd"`; `"pairs"` is all pairs in one process.
        take_over (`bool`, *optional*, defaults to `False`): See `one_writer`.
        shows_expected (`bool`, *optional*, defaults to `False`): Whether to measure a few steps and print how long the
            phases will take before they run. Not for a single phase, nor for another engine than `local`.

    Returns:
        Path of the report (`report.md`); `None` if phases are still missing that other processes run.

    Raises:
        `RecipeError`: the recipe has no such phase.
        `RunError`: the folder has a run of another recipe or cannot be written, another process makes an artifact, or
            what `phase` reads is not finished.
    """
    try:
        return _run(recipe, phase, take_over, shows_expected)
    except KeyboardInterrupt:
        Screen().say(_kept(recipe))
        raise
    except WriteError as error:
        raise RunError(f"{error} Finished phases are kept.") from error


def _run(recipe: Recipe, name: str | None, take_over: bool, shows_expected: bool) -> Path | None:
    quieten()
    use_all_cores()
    processes = num_processes(recipe)
    data, screen = RunData(recipe), Screen()
    data.check()
    for line in data.describe():
        screen.say(line)
    phases = all_phases(recipe, data, screen)
    RecipeNetworks(recipe, data.class_names)
    check_arguments(phases)
    if name is not None:
        _run_one(_named(name, phases), phases, recipe, data, take_over)
        return _end(recipe) if all(phase.is_finished() for phase in phases) else None
    # other processes run the remaining parts; the one that finds all parts goes on
    shared_out = [phase for phase in phases if phase.missing()]
    own = _with_what_they_read(shared_out, phases) if shared_out else phases
    with one_writer([path for phase in own for path in phase.to_make()], take_over):
        claim_folder(recipe)
        for phase in phases:
            if phase.is_finished():
                screen.say(f"{phase.title}: finished, skipped")
        tasks = _tasks(own, phases)
        if shows_expected and tasks and recipe.engine == "local" and PartialState().num_processes == 1:
            expected = expect([phase for phase in own if not phase.is_finished()], processes)
            seconds = {title: phase.seconds for title, phase in expected.items()}
            print_expected(expected, wall_clock(tasks, seconds, processes), processes)
        # nodes of a cluster load the images themselves: they may be files of this machine's cache
        images = data if recipe.engine == "local" else RunData(recipe)
        run_tasks(recipe, tasks, partial(_work, recipe, images), processes)
    if not shared_out:
        return _end(recipe)
    for phase in shared_out:
        if missing := phase.missing():
            phase.session.say(
                f"{phase.name} {missing} are not distilled yet: set distill.pairs to them and run the recipe again"
            )
    return None if any(phase.missing() for phase in shared_out) else _run(recipe, None, take_over, shows_expected)


def _kept(recipe: Recipe) -> str:
    """What an interrupted run leaves in its folder."""
    folder = RunFolder(recipe.output_dir, recipe.seed)
    names = sorted(folder.name_of(path.parent) for path in folder.path.rglob(TRAIN_RESULTS))
    finished = [name for name in names if not name.startswith(".") and "/." not in name]
    resumed = sum(any(work.glob(f"{CHECKPOINT}*")) for work in folder.work_folders())
    kept = f"{folder.path} keeps {', '.join(finished) or 'no finished phase yet'}"
    return f"{kept}, and the checkpoints of {resumed} unfinished phase{'s' * (resumed != 1)}."


def _end(recipe: Recipe) -> Path:
    remove_leftovers(recipe)
    return make_report(recipe)


def _run_one(phase: Phase, phases: list[Phase], recipe: Recipe, data: RunData, take_over: bool) -> None:
    with one_writer(phase.to_make(), take_over):
        claim_folder(recipe)
        unread = [path for other in read_by(phase, phases) for path in other.artifacts if not is_finished(path)]
        if unread and not phase.is_finished():
            names = [phase.session.folder.name_of(path) for path in unread]
            raise RunError(
                f"{phase.title} reads {', '.join(names)}, which {phase.session.folder.path} does not have yet. Run "
                f"{'it' if len(names) == 1 else 'them'} first: --phase {names[0]}"
            )
        if phase.is_finished():
            phase.session.screen.say(f"{phase.title}: finished, skipped")
        local.run_tasks(_tasks([phase], phases), partial(_work, phase.recipe, data))


def _named(name: str, phases: list[Phase]) -> Phase:
    """The phase that makes an artifact; of several, the one that makes only it."""
    known: dict[str, Phase] = {}
    for phase in phases:
        known |= phase.by_name()
    if name not in known:
        raise RecipeError(f"--phase is {name!r}, but the recipe has only {', '.join(known)}")
    return known[name]


def all_phases(recipe: Recipe, data: RunData, screen: Screen) -> list[Phase]:
    """The phases of all seeds; phases that the seeds share are those of the first seed."""
    phases: dict[str, Phase] = {}
    for seed in [recipe.seed, *recipe.repeat_seeds]:
        for phase in phases_of(Session(recipe, data, seed, screen)).values():
            phases.setdefault(phase.title, phase)
    return list(phases.values())


def read_by(phase: Phase, phases: list[Phase]) -> list[Phase]:
    """The phases whose artifacts a phase reads."""
    return [
        other
        for other in phases
        if other.name in phase.reads and (other.is_shared or other.session.seed == phase.session.seed)
    ]


def _with_what_they_read(chosen: list[Phase], phases: list[Phase]) -> list[Phase]:
    needed = [other for phase in chosen for other in _with_what_they_read(read_by(phase, phases), phases)]
    return [phase for phase in phases if phase in chosen or phase in needed]


def _tasks(chosen: list[Phase], phases: list[Phase]) -> list[Task]:
    """Tasks for the unfinished phases: first those that others wait for; otherwise seed by seed."""
    return [
        Task(
            phase.title,
            (phase.session.seed, phase.name),
            tuple(other.title for other in read_by(phase, phases)),
            phase.parts(),
            phase.resources(),
        )
        for phase in sorted(chosen, key=lambda phase: phase.rank)
        if not phase.is_finished()
    ]


def _work(recipe: Recipe, data: RunData, screen: Screen, seed: int, name: str, part: str | None = None) -> None:
    """Run one phase or a part of it, in this process or in a worker."""
    quieten()
    phase = phases_of(Session(recipe, data, seed, screen))[name]
    (phase if part is None else phase.by_name()[part]).run()


def quieten() -> None:
    """Silence transformers, whose messages a run repeats in its own words where they matter."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
