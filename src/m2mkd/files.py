"""Files and folders that appear whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from m2mkd.errors import HubError, RunError, WriteError


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """
    Let `write` fill a temporary folder next to `folder`, then move it into place in one step. Only the main process
    writes; the others wait.

    Raises:
        `WriteError`: the disk is full or not writable.
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
    """Turn any failure of a write (usually a full disk) into a `WriteError` that names the path."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise WriteError(_write_advice(path, error)) from error
    except RuntimeError as error:
        # torch.save reports a full disk as a RuntimeError of its zip writer
        if "PytorchStreamWriter" in str(error) or "write" in str(error) and "disk" in str(error):
            raise WriteError(_write_advice(path, error)) from error
        raise


def _write_advice(path: Path, error: Exception) -> str:
    existing = next(parent for parent in [path, *path.parents] if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return (
        f"Cannot write {path}: {error}. {free:.2f} GB are free there. Free up disk space, or check the permissions, "
        "and run the same command again."
    )


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step, so that no reader sees half a file."""
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


def read_config(folder: Path) -> dict:
    """Read `config.json` of a saved model. Raises `HubError` if it is missing or damaged."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise HubError(
            f"{path} is missing: {folder} is not a folder of a saved model. Save one with save_pretrained."
        ) from error
    except ValueError as error:
        raise HubError(f"{path} is damaged ({error}). Save the model again.") from error
    if not isinstance(config, dict):
        raise HubError(f"{path} is damaged (not a JSON object). Save the model again.")
    return config
