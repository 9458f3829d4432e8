"""A run's folder belongs to one recipe; what may still change in it depends on what is finished."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from m2mkd.trainer.folders import RunError, explained_write_errors, is_finished, read_json, write_json
from m2mkd.trainer.recipe import Recipe


# Can change at any time: arms and seeds can be added, and phases or pairs shared out, without touching what is
# finished.
_FREE = ("name", "output_dir", "arms", "repeat_seeds", "equal_compute", "processes", "distill.pairs")
# Phases whose result depends on a section, as patterns of folders; `data` is resolved by name.
_META, _TEACHER, _PAIRS, _ARMS = "meta", "teacher", "**/pairs/*", "**/arms/*"
_PHASES_OF = {
    "meta": (_META, _TEACHER, _PAIRS, "**/arms/m2mkd"),
    "teacher": (_TEACHER, _PAIRS, "**/arms/m2mkd", "**/arms/kd*"),
    "student": (_PAIRS, _ARMS),
    "distill": (_PAIRS, "**/arms/m2mkd", "**/arms/*_equal_compute"),
    "finetune": (_ARMS,),
    "kd": ("**/arms/kd*",),
    "evaluation": (_META, _TEACHER, _ARMS),
}
_ALL = (_META, _TEACHER, _PAIRS, _ARMS)
# Training arguments can change in the middle of a phase: after a loss that was not finite, say.
_TRAINING = ("training", "incubation", "finetuning")


def claim_folder(output_dir: Path, recipe: Recipe) -> None:
    """
    Note the recipe in the run's folder. Keys that no finished phase depends on may have changed since the last start;
    checkpoints of a phase whose networks or data changed are dropped.

    Raises:
        `RunError`: a finished phase depends on a key that changed, or the folder cannot be written.
    """
    path, ours = output_dir / "recipe.json", recipe.model_dump(mode="json")
    if PartialState().is_main_process:
        with explained_write_errors(path):
            output_dir.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check_changes(output_dir, _differences(read_json(path), ours), recipe)
        with explained_write_errors(path):
            write_json(path, ours)
    PartialState().wait_for_everyone()


def _check_changes(output_dir: Path, changes: dict[str, str], recipe: Recipe) -> None:
    changes = {key: line for key, line in changes.items() if not key.startswith(_FREE)}
    refused = {}
    for key, line in changes.items():
        finished = [folder for folder in _folders(output_dir, key, recipe) if is_finished(folder)]
        if finished:
            refused[key] = f"{key}: {line} ({', '.join(str(folder.relative_to(output_dir)) for folder in finished)})"
    if refused:
        raise RunError(
            f"{output_dir} holds a run of another recipe. Choose another --output_dir, delete the finished phases "
            "that stand behind each key, or set a training argument for one phase alone "
            "(--finetune.training.learning_rate, say). What differs (there → here):\n  "
            + "\n  ".join(refused.values())
        )
    for key in changes:
        if not set(_TRAINING) & set(key.split(".")):
            for folder in output_dir.rglob(".*.work"):
                shutil.rmtree(folder)


def _folders(output_dir: Path, key: str, recipe: Recipe) -> list[Path]:
    """Folders of the phases that depend on a key of the recipe."""
    section, _, rest = key.partition(".")
    phases_of = dict(_PHASES_OF)
    if recipe.meta.init == "from_teacher" and key != "meta.init":
        # the teacher comes first
        phases_of["meta"] = tuple(phase for phase in phases_of["meta"] if phase != _TEACHER)
        phases_of["teacher"] = (_META, *phases_of["teacher"])
    patterns = phases_of.get(section, _ALL)
    if section == "data":
        name = rest.partition(".")[0]
        users = {
            "meta": recipe.meta.data,
            "teacher": recipe.teacher.data,
            "distill": recipe.distill.data,
            "finetune": recipe.finetune.data,
        }
        sections = [user for user, data in users.items() if data == name]
        if name in (recipe.evaluation.iid, recipe.evaluation.ood):
            sections.append("evaluation")
        patterns = tuple(pattern for user in sections for pattern in phases_of[user])
    return sorted({folder for pattern in patterns for folder in output_dir.glob(pattern)})


def _differences(theirs: Any, ours: Any, key: str = "") -> dict[str, str]:
    if isinstance(theirs, dict) and isinstance(ours, dict):
        changes: dict[str, str] = {}
        for name in dict.fromkeys([*theirs, *ours]):
            changes |= _differences(theirs.get(name), ours.get(name), f"{key}.{name}" if key else name)
        return changes
    return {} if theirs == ours else {key: f"{theirs} → {ours}"}
