"""The artifacts of a run: whether one is finished, and from which checkpoint training resumes."""

import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState

from m2mkd.errors import RunError
from m2mkd.files import read_json
from m2mkd.trainer.student_trainer import COMPLETE_MARKER


TRAIN_RESULTS = "train_results.json"
EVAL_RESULTS = "eval_results.json"
RECIPE_FILE = "recipe.json"
CHECKPOINT = "checkpoint-"
RUN_AGAIN = "Run the recipe again: finished phases are kept, and missing ones run."
REPEAT = "Delete {folder} and run the recipe again: that phase runs again, and the other finished phases are kept."


def check_is_run(folder: Path) -> None:
    """Raise `RunError` if no run has recorded its recipe in a folder."""
    if not (folder / RECIPE_FILE).is_file():
        raise RunError(
            f"{folder} is not the folder of a run: it has no {RECIPE_FILE}. Give the `output_dir` of a run."
        )


def read_noted_recipe(run_folder: Path) -> dict[str, Any]:
    """Read the recipe that a run has recorded. Raises `RunError` if the folder is not a run or the file is damaged."""
    check_is_run(run_folder)
    way_out = (
        "Delete this file and run the recipe of this run again: its finished phases are kept, and the file is written "
        "again."
    )
    return read_json(run_folder / RECIPE_FILE, RunError, way_out)


def read_results(folder: Path, name: str = TRAIN_RESULTS) -> dict[str, Any]:
    """Results in the folder of a finished phase. Raises `RunError` if they are missing or damaged."""
    return read_json(folder / name, RunError, REPEAT.format(folder=folder) if folder.is_dir() else RUN_AGAIN)


def is_finished(folder: Path) -> bool:
    """Whether a phase has written its folder, which appears in one step and includes the results."""
    return (folder / TRAIN_RESULTS).is_file()


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Find the newest complete checkpoint in `folder`; incomplete ones of a killed process are deleted."""
    checkpoints = sorted(folder.glob(f"{CHECKPOINT}*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in checkpoints if (path / COMPLETE_MARKER).is_file()]
    if PartialState().is_main_process:
        for path in set(checkpoints) - set(complete):
            shutil.rmtree(path)
    PartialState().wait_for_everyone()
    return complete[-1] if complete else None


def keep_tracker_files(work: Path, folder: Path) -> None:
    """Copy the files that trackers (`report_to`) wrote next to the checkpoints, in all sessions, to `folder`."""
    for path in work.glob("*"):
        if path.is_dir() and not path.name.startswith(CHECKPOINT):
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy(path, folder)
