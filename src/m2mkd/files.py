"""Files and folders that appear whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from m2mkd.errors import M2MKDError, WriteError


_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


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
        if _is_of_zip_writer(error):
            raise WriteError(_write_advice(path, error)) from error
        raise


def explained_disk_error(error: OSError | RuntimeError) -> WriteError | None:
    """What to say about an error that a full, read-only or failing disk caused; `None` for all others."""
    is_disk = error.errno in _DISK_ERRORS if isinstance(error, OSError) else _is_of_zip_writer(error)
    return WriteError(_write_advice(Path(getattr(error, "filename", None) or "."), error)) if is_disk else None


def _is_of_zip_writer(error: RuntimeError) -> bool:
    text = str(error)
    return "PytorchStreamWriter" in text or "inline_container" in text or ("write" in text and "disk" in text)


def _write_advice(path: Path, error: Exception) -> str:
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free / 1e9
    return (
        f"Cannot write {path}: {error}. {free:.2f} GB are free there. Free up disk space, or check the permissions, "
        "and run the same command again."
    )


@contextmanager
def replaced_file(path: Path) -> Iterator[Path]:
    """Gives a path to write to. What lies there at the end takes the place of `path`; after an error nothing does."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_files(folder: Path, contents: Mapping[str, bytes | dict[str, Any]]) -> None:
    """
    Write files into a folder, which is created if it does not exist, each in one step; a dictionary becomes JSON.
    Raises `WriteError`.
    """
    with explained_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if isinstance(content, dict):
                write_json(folder / name, content)
                continue
            with replaced_file(folder / name) as temporary:
                temporary.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """Write JSON in one step, so that no reader sees half a file."""
    with replaced_file(path) as temporary:
        text = json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)
        temporary.write_bytes(f"{text}\n".encode())


def check_inside(folder: Path, paths: Iterable[Path], kind: type[M2MKDError]) -> None:
    """
    Check that paths in a folder, with their links followed, do not lead out of it, so that what somebody else wrote
    reads no other file of this machine. The links of the Hub's cache lead to the files of the same repository.

    Args:
        folder (`Path`)
        paths (`Iterable[Path]`)
        kind (`type[M2MKDError]`): What is raised if one does.
    """
    root = folder.resolve()
    snapshots = next((parent for parent in root.parents if parent.name == "snapshots"), None)
    allowed = root if snapshots is None else snapshots.parent
    for path in paths:
        try:
            is_inside = path.resolve().is_relative_to(allowed)
        except (OSError, RuntimeError, ValueError):  # a circle of links, or no path at all
            is_inside = False
        if not is_inside:
            raise kind(f"{path} leads out of {folder}. Put the file itself into that folder, or remove the link.")


def read_json(path: Path, kind: type[M2MKDError], way_out: str) -> dict[str, Any]:
    """
    Read a JSON object.

    Args:
        path (`Path`)
        kind (`type[M2MKDError]`): What is raised if the file is missing or damaged.
        way_out (`str`): What the user can do then, in a sentence.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise kind(f"{path} {what}. {way_out}") from error
    except ValueError as error:  # not JSON, or not text
        raise kind(f"{path} is damaged ({error}). {way_out}") from error
    if not isinstance(content, dict):
        raise kind(f"{path} is damaged (not a JSON object). {way_out}")
    return content
