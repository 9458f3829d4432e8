"""A run's folder belongs to one recipe; what may still change in it depends on what is finished."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from m2mkd.trainer.folders import (
    RECIPE_FILE,
    RunError,
    explained_write_errors,
    is_finished,
    read_noted_recipe,
    write_json,
)
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
# Training arguments that change neither weights nor results, so that they may change at any time: how images are read
# (but not in which order), and what is shown, logged, kept and sent where.
_OPERATIONAL = {
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
    *("dataloader_prefetch_factor", "dataloader_multiprocessing_context", "torch_empty_cache_steps", "ddp_timeout"),
    *("logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level"),
    *("log_level_replica", "log_on_each_node", "disable_tqdm", "report_to", "run_name", "project"),
    *("trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "include_num_input_tokens_seen"),
    *("skip_memory_metrics", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint", "do_train", "do_eval"),
    *("do_predict", "push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
    "hub_revision",
}
# These as well, unless the best checkpoint becomes the result.
_CHECKPOINTS, _TAKES_BEST = {"save_strategy", "save_steps"}, "load_best_model_at_end"


def claim_folder(output_dir: Path, recipe: Recipe) -> None:
    """
    Note the recipe in the run's folder. Keys that no finished phase depends on may have changed since the last start,
    and so may training arguments that change no weights; checkpoints of a phase whose networks or data changed are
    dropped.

    Raises:
        `RunError`: a finished phase depends on a key that changed, or the folder cannot be written.
    """
    path, ours = output_dir / RECIPE_FILE, recipe.model_dump(mode="json")
    if PartialState().is_main_process:
        with explained_write_errors(path):
            output_dir.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            _check_changes(output_dir, _differences(read_noted_recipe(output_dir), ours), recipe)
        with explained_write_errors(path):
            write_json(path, ours)
    PartialState().wait_for_everyone()


def _check_changes(output_dir: Path, changes: dict[str, str], recipe: Recipe) -> None:
    changes = {
        key: line for key, line in changes.items() if not key.startswith(_FREE) and not _is_operational(key, recipe)
    }
    refused = {}
    for key, line in changes.items():
        finished = [folder for folder in _folders(output_dir, key, recipe) if is_finished(folder)]
        if finished:
            refused[key] = f"{key}: {line} ({', '.join(str(folder.relative_to(output_dir)) for folder in finished)})"
    if refused:
        raise RunError(_advice(output_dir, refused))
    for key in changes:
        if not set(_TRAINING) & set(key.split(".")):
            for folder in output_dir.rglob(".*.work"):
                shutil.rmtree(folder)


def _is_operational(key: str, recipe: Recipe) -> bool:
    parts = key.split(".")
    inside = [index for index, part in enumerate(parts[:-1]) if part in _TRAINING]
    if not inside:
        return False
    argument = parts[inside[0] + 1]
    takes_best = any(training.get(_TAKES_BEST) for training in recipe.all_training())
    return argument in _OPERATIONAL or (argument in _CHECKPOINTS and not takes_best)


def _advice(output_dir: Path, refused: dict[str, str]) -> str:
    shared = next((key for key in refused if key.startswith("training.")), None)
    one_phase = (
        " To change a training argument of a phase that is not finished, set it for that phase alone "
        f"(--finetune.{shared} …)."
        if shared is not None
        else ""
    )
    return (
        f"{output_dir} holds a run of another recipe: values that its finished phases depend on have changed. To keep "
        "these phases, set the old values again. To run the recipe as it is now, choose another --output_dir, or "
        f"delete the folders in parentheses: they are made again.{one_phase} What differs (there → here):\n  "
        + "\n  ".join(refused.values())
    )


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
