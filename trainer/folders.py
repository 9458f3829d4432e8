"""The files of a run: folders that appear whole or not at all, and checkpoints that are complete."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from m2mkd.trainer.m2mkd_trainer import COMPLETE_MARKER


TRAIN_RESULTS = "train_results.json"
EVAL_RESULTS = "eval_results.json"
RECIPE_FILE = "recipe.json"
CHECKPOINT = "checkpoint-"


class RunError(RuntimeError):
    """A run cannot go on; the message says what to do. Finished phases are kept."""


def check_is_run(folder: Path) -> None:
    """Raises `RunError` if no run has noted its recipe in a folder."""
    if not (folder / RECIPE_FILE).is_file():
        raise RunError(f"{folder} is no folder of a run: it has no {RECIPE_FILE}. Give the `output_dir` of a run.")


def read_noted_recipe(run_folder: Path) -> Any:
    """The recipe that a run has noted. Raises `RunError` if the folder is no run, or the file is damaged."""
    check_is_run(run_folder)
    path = run_folder / RECIPE_FILE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). Delete this file and run the recipe of this run again: its finished "
            "phases are kept, and the file is written again."
        ) from error


def is_finished(folder: Path) -> bool:
    """Whether a phase has written its folder: its results are the last file of a folder that appears at once."""
    return (folder / TRAIN_RESULTS).is_file()


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """
    Let `write` fill a folder beside `folder`, then put it in place in one step. Only the main process writes; the
    others wait.

    Raises:
        `RunError`: the disk is full or not writable.
    """
    state = PartialState()
    if state.is_main_process:
        temporary = folder.parent / f".{folder.name}.tmp"
        with explained_write_errors(folder):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
    state.wait_for_everyone()


@contextmanager
def explained_write_errors(path: Path) -> Iterator[None]:
    """Turn the ways in which a write fails (a full disk above all) into one `RunError` that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise RunError(_write_advice(path, error)) from error
    except RuntimeError as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer
        if "PytorchStreamWriter" in str(error) or "write" in str(error) and "disk" in str(error):
            raise RunError(_write_advice(path, error)) from error
        raise


def _write_advice(path: Path, error: Exception) -> str:
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return (
        f"Cannot write {path}: {error}. {free:.2f} GB are free there. Make room, or check the permissions, and run "
        "the same command again: finished phases are kept."
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step, so that no reader meets half a file."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
    os.replace(temporary, path)


def read_json(path: Path) -> Any:
    """Read JSON. Raises `RunError` if the file is missing or damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise RunError(
            f"{path} cannot be read ({error}). Delete {path.parent} and run the same command again: that phase is "
            "repeated, the others are kept."
        ) from error


def last_complete_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end; what a killed process left behind is deleted."""
    checkpoints = sorted(folder.glob(f"{CHECKPOINT}*"), key=lambda path: int(path.name.rpartition("-")[2]))
    complete = [path for path in checkpoints if (path / COMPLETE_MARKER).is_file()]
    if PartialState().is_main_process:
        for path in set(checkpoints) - set(complete):
            shutil.rmtree(path)
    PartialState().wait_for_everyone()
    return complete[-1] if complete else None


def keep_tracker_files(work: Path, folder: Path) -> None:
    """Copy what trackers (`report_to`) wrote beside the checkpoints, in every session of a training, to `folder`."""
    for path in work.glob("*"):
        if path.is_dir() and not path.name.startswith(CHECKPOINT):
            shutil.copytree(path, folder / path.name, dirs_exist_ok=True)
        elif path.is_file():
            shutil.copy(path, folder)
