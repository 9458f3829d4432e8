"""Reads what `m2mkd convert` is given: an official checkpoint in any of its layouts, and its configuration."""

import json
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file

from m2mkd.conversion.official_models import assemble_stages, without_aliases
from m2mkd.errors import ConversionError


@dataclass
class Checkpoint:
    """
    A checkpoint as it was read.

    Args:
        model (`dict`, *optional*): State dict of a whole model, or of whatever a file without a wrapper holds.
        stages (`list[dict]`): State dicts of the model's stages.
        block (`dict`, *optional*): State dict of one stage of a split teacher.
        block_index (`int`, *optional*): Which stage that is.
        depths (`list[int]`, *optional*): Layers of each stage of that teacher.
    """

    model: dict[str, Any] | None = None
    stages: list[dict[str, Any]] = field(default_factory=list)
    block: dict[str, Any] | None = None
    block_index: int | None = None
    depths: list[int] | None = None

    def model_of(self, depths: list[int] | None = None) -> dict[str, Any]:
        """State dict of the whole model."""
        if self.model is not None:
            return without_aliases(self.model)
        if self.stages and depths and len(depths) == len(self.stages):
            return assemble_stages(self.stages, depths)
        raise ConversionError(
            "the checkpoint holds one stage of a split teacher (`block_state_dict`), not a whole model."
            if self.block is not None
            else f"the checkpoint has no `model`, and {len(self.stages)} `model_stages` for the depths {depths}."
        )

    def stage_of(self, stage: int, depths: list[int]) -> dict[str, Any]:
        """State dict of one stage, whose blocks count from 0."""
        if not isinstance(stage, int) or not 0 <= stage < len(depths):
            raise ConversionError(
                f"there is no stage {stage}; the depths {depths} make stages 0 to {len(depths) - 1}."
            )
        if self.block is not None:
            return self.block
        if self.stages:
            if len(self.stages) != len(depths):
                raise ConversionError(f"the checkpoint has {len(self.stages)} stages, the depths are {depths}.")
            return self.stages[stage]
        return self.model_of()


def read_config(path: Path) -> dict[str, Any]:
    """The content of an official YAML file or a JSON file. Raises `ConversionError`."""
    try:
        text = path.read_text()
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConversionError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConversionError(f"{path} must hold sections, but is {type(content).__name__}.")
    return content


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint without running code from it. Raises `ConversionError`."""
    if not path.is_file():
        raise ConversionError(f"There is no file {path}.")
    try:
        if path.suffix == ".safetensors":
            return Checkpoint(model=load_file(path))
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return Checkpoint(model={name: _tensor(arrays[name]) for name in arrays.files})
        # mapped: of a checkpoint with an optimizer only the model is ever read
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path) or None)
    except pickle.UnpicklingError as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(
            f"{path} is not a checkpoint of plain tensors, and nothing in it is executed (weights_only=True). Either "
            "it is damaged, or it holds objects in addition to tensors: load it where you trust it and save only its "
            f"state dict. torch says: {reason}"
        ) from error
    except (
        SafetensorError,
        zipfile.BadZipFile,
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
    ) as error:
        reason = str(error).split("\n")[0]
        raise ConversionError(f"{path} is damaged or not a checkpoint: {reason}") from error
    return _layout(content, path)


def _tensor(array: np.ndarray) -> torch.Tensor:
    # numpy knows no bfloat16, and keeps its two bytes
    if array.dtype == np.dtype("V2"):
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def _layout(content: Any, path: Path) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise ConversionError(f"{path} must hold a state dict, but holds a {type(content).__name__}.")
    if "block_state_dict" in content:
        return Checkpoint(
            block=_state_dict(content, "block_state_dict", path),
            block_index=content.get("block_index"),
            depths=content.get("divided_depths"),
        )
    if "model" in content or "model_stages" in content:
        stages = content.get("model_stages") or []
        if not isinstance(stages, list) or not all(isinstance(stage, Mapping) for stage in stages):
            raise ConversionError(f"`model_stages` of {path} is not a list of state dicts.")
        model = _state_dict(content, "model", path) if content.get("model") is not None else None
        return Checkpoint(model=model, stages=[dict(stage) for stage in stages])
    return Checkpoint(model=dict(content))


def _state_dict(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(content[name], Mapping):
        raise ConversionError(f"`{name}` of {path} is not a state dict, but a {type(content[name]).__name__}.")
    return dict(content[name])


def section(content: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """A section below the dotted path. Raises `ConversionError`."""
    value: Any = content
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise ConversionError(f"the configuration has no section `{'.'.join(path)}`; it has {sorted(content)}.")
    return dict(value)
