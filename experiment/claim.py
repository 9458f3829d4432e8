"""A run's folder belongs to one recipe; the keys that may still change depend on which phases are finished."""

import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from accelerate import PartialState

from m2mkd.errors import RecipeError, RunError
from m2mkd.experiment.arms import Arm, arm_of_folder
from m2mkd.experiment.artifact import is_finished, read_noted_recipe, read_results
from m2mkd.experiment.dependence import TRAINING, depends, is_free
from m2mkd.experiment.one_writer import Writer, other_writers
from m2mkd.experiment.phases import Phase, phases_of
from m2mkd.experiment.recipe import Recipe
from m2mkd.experiment.recipe_file import parse_recipe
from m2mkd.experiment.run_data import RunData
from m2mkd.experiment.run_folder import RunFolder
from m2mkd.experiment.session import Session
from m2mkd.files import explained_write_errors, write_json
from m2mkd.screen import Screen


def claim_folder(recipe: Recipe) -> None:
    """
    Record the recipe in the run's folder. Since the last start, keys that no finished phase depends on may have
    changed, and so may training arguments that do not affect the weights. Checkpoints of a phase whose networks or
    data changed are deleted.

    Raises:
        `RunError`: a finished phase, or one that another process makes, depends on a key that changed, or the folder
            cannot be written.
    """
    folder = RunFolder(recipe.output_dir, recipe.seed)
    path = folder.recipe
    if PartialState().is_main_process:
        with explained_write_errors(path):
            folder.path.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check_changes(folder, _changes(folder, recipe), recipe)
        with explained_write_errors(path):
            write_json(path, recipe.model_dump(mode="json"))
    PartialState().wait_for_everyone()


def remove_leftovers(recipe: Recipe) -> None:
    """
    Remove what killed processes left in a run's folder: locks, temporary files, and the checkpoints of finished
    artifacts. Does nothing while other processes make artifacts.
    """
    folder, here = RunFolder(recipe.output_dir, recipe.seed), Writer.here()
    if not PartialState().is_main_process or other_writers(folder):
        return
    left = [*folder.locks(), *folder.temporary(), *(work for work in folder.work_folders() if _is_done(work, folder))]
    for path in left:
        with suppress(FileNotFoundError):
            # a newer one belongs to a process that has just started
            if path.stat().st_mtime < here.started:
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_done(work: Path, folder: RunFolder) -> bool:
    artifact = work.with_name(work.name.removeprefix(".").removesuffix(".work"))
    return is_finished(folder.teacher if artifact == folder.incubation else artifact)


def _changes(folder: RunFolder, recipe: Recipe) -> dict[str, str]:
    """Differences from the recorded recipe, as text by dotted key, without keys that may always change."""
    try:
        there = parse_recipe(read_noted_recipe(folder.path), str(folder.recipe))
    except RecipeError as error:
        raise RunError(f"{folder.path} has a run of a recipe that is not valid in this version. {error}") from error
    # the words of a finished arm count, even if the last start did not ask for that arm
    made = {arm.name: arm.words() for seed in folder.seeds() for arm in _arms_of_folder(folder, seed)}
    theirs = {**there.model_dump(mode="json"), "arms": {**_words(there), **made}}
    ours = {**recipe.model_dump(mode="json"), "arms": _words(recipe)}
    changes = _differences(theirs, ours)
    return {key: line for key, line in changes.items() if not is_free(key, recipe)}


def _words(recipe: Recipe) -> dict[str, Any]:
    return {name: arm.words() for name, arm in recipe.all_arms.items()}


def _check_changes(folder: RunFolder, changes: dict[str, str], recipe: Recipe) -> None:
    phases = {seed: phases_of(_session(recipe, seed), known_arms(folder, recipe, seed)) for seed in folder.seeds()}
    refused, dropped = {}, []
    for key, line in changes.items():
        affected = [phase for own in phases.values() for phase in _affected(key, own)]
        finished = {path for phase in affected for path in phase.artifacts if is_finished(path)}
        names = ", ".join(sorted(str(path.relative_to(folder.path)) for path in finished))
        if finished:
            refused[key] = f"{key}: {line} ({names})"
        elif affected and not set(TRAINING) & set(key.split(".")):
            dropped.append(key)
    if refused:
        raise RunError(_advice(folder.path, refused))
    if changes and (others := other_writers(folder)):
        raise RunError(
            f"{folder.path} has a run of another recipe, which {others[0].in_words()}, is at work on. Wait until it "
            "ends, or choose another --output_dir. Changes (old → new):\n  "
            + "\n  ".join(f"{key}: {line}" for key, line in changes.items())
        )
    for work in list(folder.work_folders()) if dropped else []:
        shutil.rmtree(work)


def _advice(output_dir: Path, refused: dict[str, str]) -> str:
    shared = next((key for key in refused if key.startswith("training.")), None)
    one_phase = (
        f" To change a training argument of an unfinished phase, set it only for that phase (--finetune.{shared} …)."
        if shared is not None
        else ""
    )
    return (
        f"{output_dir} has a run of another recipe: values that its finished phases depend on have changed. To keep "
        "these phases, set the old values again. To run the recipe as it is now, choose another --output_dir, or "
        f"delete the folders in parentheses, and their phases run again.{one_phase} Changes (old → new):\n  "
        + "\n  ".join(refused.values())
    )


def _session(recipe: Recipe, seed: int) -> Session:
    return Session(recipe, RunData(recipe), seed, Screen())


def known_arms(folder: RunFolder, recipe: Recipe, seed: int) -> list[Arm]:
    """The arms of a recipe, and those that have a folder for one of its seeds."""
    return list({**{arm.name: arm for arm in _arms_of_folder(folder, seed)}, **recipe.all_arms}.values())


def _arms_of_folder(folder: RunFolder, seed: int) -> list[Arm]:
    arms = []
    for name in folder.arm_names(seed):
        own = folder.arm(name, seed)
        words = read_results(own).get("arm") if is_finished(own) else None
        arms.append(arm_of_folder(name, words))
    return [arm for arm in arms if arm is not None]


def _affected(key: str, phases: dict[str, Phase]) -> Iterable[Phase]:
    """The phases that depend on a key of the recipe, and those that read them."""
    names = {name for name, phase in phases.items() if depends(phase, key)}
    while True:
        readers = {name for name, phase in phases.items() if names & set(phase.reads)} - names
        if not readers:
            return [phases[name] for name in phases if name in names]
        names |= readers


def _differences(theirs: Any, ours: Any, key: str = "") -> dict[str, str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        changes: dict[str, str] = {}
        for name in dict.fromkeys([*theirs, *ours]):
            changes |= _differences(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
        return changes
    return {} if theirs == ours else {key: f"{theirs} → {ours}"}
