# Copyright 2026 The m2mkd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""One distilled pair on disk: the student stage under the student's own names, its stitches, and where both belong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from m2mkd.modeling.stages import Stage
from m2mkd.modeling.stitched_stage import StitchedStage


STAGE_FILE = "model.safetensors"
STITCHES_FILE = "stitches.safetensors"
CONTRACT_FILE = "pair.json"


class PairFileError(ValueError):
    """A pair's folder is missing, damaged, or belongs to another student."""


def save_pair(pair: StitchedStage, folder: str | Path, stitch_size: int) -> None:
    """
    Write `config.json`, `model.safetensors` (the stage's tensors, named as in the student), `stitches.safetensors` and
    `pair.json` into `folder`.

    Args:
        pair (`StitchedStage`)
        folder (`str` or `Path`): Created if needed.
        stitch_size (`int`): Width of the meta model.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage = pair.stage
    stage.config.save_pretrained(folder)
    save_file(_on_cpu(stage.state_dict()), folder / STAGE_FILE, metadata={"format": "pt"})
    save_file(_on_cpu(pair.stitch_state_dict()), folder / STITCHES_FILE, metadata={"format": "pt"})
    contract = {**_contract(stage), "stitch_size": stitch_size}
    (folder / CONTRACT_FILE).write_text(json.dumps(contract, indent=2) + "\n")


def load_stage(stage: Stage, folder: str | Path, reinitialize: tuple[str, ...] = ()) -> list[str]:
    """
    Load the weights of a pair's folder into a stage, strictly: every tensor must be there and fit.

    Args:
        stage (`Stage`): View on the student to fill.
        folder (`str` or `Path`): What [`save_pair`] wrote.
        reinitialize (`tuple[str, ...]`): Parts of tensor names (e.g. `"classifier"`) that may differ in shape because
            the student now serves other data; such tensors keep the values that they have.

    Returns:
        `list[str]`: Names of the tensors that were not loaded because their shape differs.

    Raises:
        `PairFileError`: a file is missing or truncated, the contract is of another pair, names or shapes differ.
    """
    folder, stage = Path(folder), stage.distilled()
    contract = read_contract(folder)
    for field, ours in _contract(stage).items():
        if contract.get(field) != ours:
            raise PairFileError(
                f"{folder / CONTRACT_FILE} says `{field}` is {contract.get(field)}, but this student's stage "
                f"{stage.index} has {ours}. Use the pair that was distilled for this stage, or the student's depths "
                "that it was distilled with."
            )
    ours, saved = stage.state_dict(), _read_tensors(folder / STAGE_FILE)
    missing, unexpected = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    if missing or unexpected:
        raise PairFileError(f"{folder / STAGE_FILE} lacks {missing} and has the unexpected {unexpected}.")
    misfits = [name for name in ours if ours[name].shape != saved[name].shape]
    refused = [name for name in misfits if not any(part in name for part in reinitialize)]
    if refused:
        shapes = {name: (tuple(saved[name].shape), tuple(ours[name].shape)) for name in refused}
        raise PairFileError(f"{folder / STAGE_FILE} does not fit; (saved, expected) shapes differ: {shapes}.")
    stage.load_state_dict({name: ours[name] if name in misfits else saved[name] for name in ours}, strict=True)
    return misfits


def load_stitches(pair: StitchedStage, folder: str | Path) -> None:
    """Load `stitches.safetensors` of a pair's folder into `pair`, strictly. Raises `PairFileError`."""
    saved = _read_tensors(Path(folder) / STITCHES_FILE)
    ours = pair.stitch_state_dict()
    if _shapes(ours) != _shapes(saved):
        raise PairFileError(
            f"{Path(folder) / STITCHES_FILE} holds {_shapes(saved)}, but the pair's stitches are {_shapes(ours)}."
        )
    pair.load_state_dict(saved, strict=False)


def keep_stitches(student: PreTrainedModel, folder: str | Path) -> None:
    """
    Copy a pair's stitches into a V-MoE whose config holds them (`pre_stitch_layers`, `post_stitch_layers`).

    Raises:
        `PairFileError`: a file is missing, a stitch has no place in the model, or a place has no stitch.
    """
    folder = Path(folder)
    layers, saved = read_contract(folder)["layers"], _read_tensors(folder / STITCHES_FILE)
    ours = {}
    for side, layer in (("pre", layers[0]), ("post", layers[-1])):
        stitch = getattr(student.get_submodule(f"vmoe.layers.{layer}"), f"{side}_stitch")
        if stitch is not None:
            ours.update({f"{side}.{name}": parameter for name, parameter in stitch.named_parameters()})
    if _shapes(ours) != _shapes(saved):
        raise PairFileError(
            f"{folder / STITCHES_FILE} holds {_shapes(saved)}, but the student has places for {_shapes(ours)}. Set "
            "`pre_stitch_layers`, `post_stitch_layers` and `stitch_size` in its config; it keeps stitches of type "
            "'layernorm_linear' alone."
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(saved[name])


def read_contract(folder: str | Path) -> dict[str, Any]:
    """The content of `pair.json`. Raises `PairFileError` if it is missing or damaged."""
    path = Path(folder) / CONTRACT_FILE
    if not path.is_file():
        raise PairFileError(f"{path} is missing: {folder} is no folder of a distilled pair.")
    try:
        contract = json.loads(path.read_text())
    except ValueError as error:  # no JSON, or no text
        raise PairFileError(f"{path} is damaged ({error}). Delete {folder} and distil this pair again.") from error
    if not isinstance(contract, dict):
        raise PairFileError(f"{path} is damaged (no JSON object). Delete {folder} and distil this pair again.")
    return contract


def _contract(stage: Stage) -> dict[str, Any]:
    return {
        "index": stage.index,
        "num_pairs": stage.num_stages,
        "layers": list(stage.layer_indices),
        "model_type": stage.config.model_type,
        "hidden_size": stage.config.hidden_size,
    }


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise PairFileError(f"{path} is missing. Delete {path.parent} and distil this pair again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PairFileError(
            f"{path} is damaged or truncated ({error}). Delete {path.parent} and distil this pair again."
        ) from error


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


__all__ = ["PairFileError", "keep_stitches", "load_stage", "load_stitches", "read_contract", "save_pair"]
