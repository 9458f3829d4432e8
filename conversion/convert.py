"""What `m2mkd convert` does: an official checkpoint and its configuration to a Hugging Face folder, strictly."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from m2mkd.conversion.checkpoint_file import read_config
from m2mkd.conversion.dinov2_onnx import Dinov2OnnxKind
from m2mkd.conversion.jax_kinds import ViTJaxKind, VMoEJaxKind
from m2mkd.conversion.kind import Kind, Request
from m2mkd.conversion.nac_kinds import NACKind, NACStudentKind
from m2mkd.conversion.transformer_kinds import ViTKind, VMoEKind, VMoEStudentKind
from m2mkd.errors import ConversionError
from m2mkd.files import explained_write_errors


KINDS: dict[str, Kind] = {
    kind.name: kind
    for kind in (
        NACKind(),
        NACStudentKind(),
        VMoEKind(),
        VMoEStudentKind(),
        ViTKind(),
        VMoEJaxKind(),
        ViTJaxKind(),
        Dinov2OnnxKind(),
    )
}


def convert(
    kind: str,
    config_path: Path | None,
    checkpoint_path: Path,
    out: Path,
    stage: int | None = None,
    num_stages: int | None = None,
) -> str:
    """
    Convert an official checkpoint.

    Args:
        kind (`str`): What the checkpoint holds, one of `KINDS`.
        config_path (`Path`, *optional*): An official YAML file, or a JSON file with the constructor's arguments. The
            JAX kinds need none if the arrays or the name of the checkpoint say everything.
        checkpoint_path (`Path`): `.pth`, `.pt`, `.safetensors`, `.npz` or `.onnx`, or what the names of
            google-research/vmoe's checkpoint files begin with.
        out (`Path`): Folder to make. It appears whole or not at all.
        stage (`int`, *optional*): Which stage a student is, or which one to take from a ViT or V-MoE.
        num_stages (`int`, *optional*): Stages of the student's model.

    Returns:
        `str`: What was written.

    Raises:
        `ConversionError`: the files are not what `kind` says, or do not belong together; nothing is written.
        `RunError`: the folder cannot be written.
    """
    if kind not in KINDS:
        raise ConversionError(f"--kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    out = out.absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConversionError(f"{out} already exists and is not empty. Give a new folder, or delete it.")
    if config_path is None and KINDS[kind].needs_config:
        raise ConversionError(f"--kind {kind} needs --config, because tensors do not show all of a model.")
    content = {} if config_path is None else read_config(config_path)
    try:
        write, what = KINDS[kind].convert(Request(content, checkpoint_path, stage, num_stages))
    except ConversionError as error:
        beside = "" if config_path is None else f" with {config_path}"
        raise ConversionError(f"{checkpoint_path}{beside}: {error}") from error
    _write(out, write)
    return f"{what} is in {out}."


def _write(out: Path, write: Callable[[Path], None]) -> None:
    temporary = out.with_name(f".{out.name}.tmp")
    try:
        with explained_write_errors(out):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            if out.is_dir():
                out.rmdir()
            os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
