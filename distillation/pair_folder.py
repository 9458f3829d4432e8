"""One distilled pair on disk: the student stage with the student's own names, its stitches, and its contract."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.distillation.split import new_network, stage_class
from m2mkd.distillation.stage import Stage
from m2mkd.distillation.stitched_stage import StitchedStage
from m2mkd.errors import PairFileError
from m2mkd.files import read_json, write_json


STAGE_FILE = "model.safetensors"
STITCHES_FILE = "stitches.safetensors"
CONTRACT_FILE = "pair.json"
# Fields that all pairs of one student have in common; a pair with other values does not fit.
_COMMON = ("model_type", "num_pairs", "hidden_size", "stitch_size")
_REPEAT = "Delete {folder}, then run its recipe again or fetch this pair again."
HASHES = {"teacher_sha256": "teacher", "meta_sha256": "meta model"}
# Fields that do not affect the weights.
_INCIDENTAL = ("transformers_version", "architectures", "dtype", "_name_or_path")


def save_pair(
    pair: StitchedStage,
    folder: str | Path,
    stitch_size: int,
    teacher_sha256: str | None = None,
    meta_sha256: str | None = None,
) -> None:
    """
    Write `config.json`, `model.safetensors` (the stage's tensors, named as in the student), `stitches.safetensors` and
    `pair.json` into `folder`.

    Args:
        pair (`StitchedStage`)
        folder (`str` or `Path`): Created if needed.
        stitch_size (`int`): Width of the meta model.
        teacher_sha256, meta_sha256 (`str`, *optional*): [`tensors_sha256`] of the networks used in the distillation.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    stage, stitches = pair.stage, _on_cpu(pair.stitch_state_dict())
    place = (stage.config, stage.index, stage.num_stages, stage.layer_indices)
    contract = make_contract(*place, stitch_size, stitches, teacher_sha256, meta_sha256)
    write_pair(folder, stage.config, contract, _on_cpu(stage.state_dict()), stitches)


def write_pair(
    folder: Path,
    config: PreTrainedConfig,
    contract: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    stitches: dict[str, torch.Tensor],
) -> None:
    """Write the files of [`save_pair`] into an existing folder."""
    config.save_pretrained(folder)
    save_file(tensors, folder / STAGE_FILE, metadata={"format": "pt"})
    save_file(stitches, folder / STITCHES_FILE, metadata={"format": "pt"})
    write_json(folder / CONTRACT_FILE, contract)


def make_contract(
    config: PreTrainedConfig,
    index: int,
    num_pairs: int,
    layers: Sequence[int],
    stitch_size: int,
    stitches: Mapping[str, torch.Tensor],
    teacher_sha256: str | None = None,
    meta_sha256: str | None = None,
) -> dict[str, Any]:
    """
    Build the content of `pair.json`: the place of a pair, and the networks that it was distilled with.

    Args:
        config (`PreTrainedConfig`): The student's configuration.
        index (`int`), num_pairs (`int`): The pair's place.
        layers (`Sequence[int]`): Its layers in the student.
        stitch_size (`int`): Width of the meta model.
        stitches (`dict[str, torch.Tensor]`): Its stitches, whose shapes the contract records.
        teacher_sha256, meta_sha256 (`str`, *optional*): `None` if unknown.
    """
    return {
        "index": index,
        "num_pairs": num_pairs,
        "layers": list(layers),
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "stitch_size": stitch_size,
        "stitches": {name: list(tensor.shape) for name, tensor in sorted(stitches.items())},
        "teacher_sha256": teacher_sha256,
        "meta_sha256": meta_sha256,
    }


def tensors_sha256(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """
    Compute the SHA-256 of a network's tensors with their types and shapes. It does not depend on how the file is split
    or on its header. Names are left out, because the classes of transformers do not always use those of the file.
    `None` if a tensor is on the meta device and thus has no values.
    """
    digests = []
    for tensor in tensors.values():
        if tensor.is_meta:
            return None
        digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
        digests.append(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def load_stage(stage: Stage, folder: str | Path, reinitialize: tuple[str, ...] = ()) -> list[str]:
    """
    Load the weights of a pair's folder into a stage, strictly: every tensor must exist and fit.

    Args:
        stage (`Stage`): View on the student to fill.
        folder (`str` or `Path`): Folder that [`save_pair`] wrote.
        reinitialize (`tuple[str, ...]`): Parts of tensor names (e.g. `"classifier"`) that may differ in shape because
            the student is now used on other data; such tensors keep their current values.

    Returns:
        `list[str]`: Names of the tensors that were not loaded because their shape differs.

    Raises:
        `PairFileError`: a file is missing or truncated, the contract is for another pair, or names or shapes differ.
    """
    folder, stage = Path(folder), stage.distilled()
    contract = read_contract(folder)
    ours = make_contract(stage.config, stage.index, stage.num_stages, stage.layer_indices, 0, {})
    for field in ("index", "num_pairs", "layers", "model_type", "hidden_size"):
        if contract.get(field) != ours[field]:
            raise PairFileError(
                f"`{field}` is {contract.get(field)} in {folder / CONTRACT_FILE}, but {ours[field]} in stage "
                f"{stage.index} of this student. Use the pair that was distilled for this stage, or cut the student "
                "into the depths that the pair was distilled with."
            )
    ours, saved = stage.state_dict(), _read_tensors(folder / STAGE_FILE)
    missing, unexpected = sorted(ours.keys() - saved.keys()), sorted(saved.keys() - ours.keys())
    if missing or unexpected:
        raise PairFileError(f"{folder / STAGE_FILE} does not fit; missing: {missing}, unexpected: {unexpected}.")
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
            f"{Path(folder) / STITCHES_FILE} has {_shapes(saved)}, but the pair's stitches are {_shapes(ours)}."
        )
    pair.load_state_dict(saved, strict=False)


def keep_stitches(student: PreTrainedModel, folder: str | Path) -> None:
    """
    Copy a pair's stitches into a V-MoE whose config has places for them (`pre_stitch_layers`, `post_stitch_layers`).

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
            f"{folder / STITCHES_FILE} has {_shapes(saved)}, but the student has places for {_shapes(ours)}. Set "
            "`pre_stitch_layers`, `post_stitch_layers` and `stitch_size` in its config; it can keep only stitches of "
            "type 'layernorm_linear'."
        )
    with torch.no_grad():
        for name, parameter in ours.items():
            parameter.copy_(saved[name])


def match_pairs(folders: Sequence[str | Path]) -> list[Path]:
    """
    Check that pairs form one student: their contracts agree, the student's configurations agree, and every place is
    taken exactly once.

    Args:
        folders (`Sequence[str | Path]`): Folders of pairs, in any order.

    Returns:
        `list[Path]`: The folders in the order of the pairs.

    Raises:
        `PairFileError`: they do not fit; the message names the two files and the field. A hash that is unknown in one
            of them is accepted, see [`unknown_networks`].
    """
    if not folders:
        raise PairFileError("There is no pair to assemble.")
    contracts = {Path(folder): read_contract(folder) for folder in folders}
    for field in _COMMON:
        _check_equal(field, {folder: contract.get(field) for folder, contract in contracts.items()}, CONTRACT_FILE)
    for field in HASHES:
        known = {folder: contract[field] for folder, contract in contracts.items() if contract.get(field)}
        _check_equal(field, known, CONTRACT_FILE)
    for name in ("config.json", "preprocessor_config.json"):
        contents = {folder: _read_json(folder, name) for folder in contracts if (folder / name).is_file()}
        for field in sorted({field for content in contents.values() for field in content} - set(_INCIDENTAL)):
            _check_equal(field, {folder: content.get(field) for folder, content in contents.items()}, name)
    places: dict[int, Path] = {}
    # not over the contracts: a folder that is given twice has one contract
    for folder in map(Path, folders):
        index = contracts[folder]["index"]
        if index in places:
            raise PairFileError(
                f"{places[index] / CONTRACT_FILE} and {folder / CONTRACT_FILE} both have `index` {index}. Give each "
                "pair once."
            )
        places[index] = folder
    number = next(iter(contracts.values()))["num_pairs"]
    missing = sorted(set(range(number)) - set(places))
    if missing or len(places) > number:
        raise PairFileError(
            f"`num_pairs` is {number} in {next(iter(contracts)) / CONTRACT_FILE}, but the given pairs are "
            f"{sorted(places)}; missing: {missing or 'none'}. Give one folder for each pair from 0 to {number - 1}."
        )
    ordered = [places[index] for index in range(number)]
    for before, after in pairwise(ordered):
        last, first = contracts[before]["layers"][-1], contracts[after]["layers"][0]
        if first != last + 1:
            raise PairFileError(
                f"`layers` in {before / CONTRACT_FILE} end with {last}, but those in {after / CONTRACT_FILE} start "
                f"with {first}. Use pairs of a student that was cut into the same depths."
            )
    return ordered


def unknown_networks(folders: Sequence[str | Path]) -> list[str]:
    """
    List the networks that contracts do not record, in sentences. A converted pair records neither teacher nor meta
    model.
    """
    contracts = {Path(folder): read_contract(folder) for folder in folders}
    return [
        f"{folder / CONTRACT_FILE} has no `{field}`, so it was not checked that all pairs have the same {network}."
        for folder, contract in contracts.items()
        for field, network in HASHES.items()
        if not contract.get(field)
    ]


def _check_equal(field: str, values: Mapping[Path, Any], name: str) -> None:
    first = next(iter(values), None)
    for folder, value in values.items():
        if value != values[first]:
            raise PairFileError(
                f"`{field}` is {values[first]!r} in {first / name} and {value!r} in {folder / name}. All modules of a "
                "student must come from one distillation: the same student, teacher and meta model."
            )


def read_contract(folder: str | Path) -> dict[str, Any]:
    """Read `pair.json`. Raises `PairFileError` if it is missing or damaged."""
    folder = Path(folder)
    path = folder / CONTRACT_FILE
    if not path.is_file():
        raise PairFileError(f"{path} is missing: {folder} is not the folder of a distilled pair.")
    contract = _read_json(folder, CONTRACT_FILE)
    numbers, layers = [contract.get(name) for name in ("index", "num_pairs")], contract.get("layers")
    if not isinstance(layers, list) or not layers or not all(isinstance(item, int) for item in [*numbers, *layers]):
        raise PairFileError(
            f"{path} is damaged (`index`, `num_pairs` or `layers` is missing or not a number). "
            f"{_REPEAT.format(folder=folder)}"
        )
    return contract


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    return read_json(folder / name, PairFileError, _REPEAT.format(folder=folder))


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise PairFileError(f"{path} is missing. {_REPEAT.format(folder=path.parent)}")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise PairFileError(
            f"{path} is damaged or truncated ({error}). {_REPEAT.format(folder=path.parent)}"
        ) from error


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def with_stitches(student: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """
    Build a copy of a V-MoE with the stitches of its pairs between its layers.

    Args:
        student (`PreTrainedModel`): The V-MoE without stitches, with the layers of its pairs loaded.
        folders (`Sequence[Path]`): The folders of all its pairs, in order.

    Raises:
        `PairFileError`: a file is damaged, or a stitch has no place, as in any model that is not a V-MoE.
    """
    contracts = [read_contract(folder) for folder in folders]
    if not stage_class(type(student)).keeps_stitches:
        raise PairFileError(
            f"A {student.config.model_type} has no place for stitches; only a vmoe can keep them. Leave them out."
        )
    stitches = {
        "stitch_size": contracts[0]["stitch_size"],
        "pre_stitch_layers": [contract["layers"][0] for contract in contracts[1:]],
        "post_stitch_layers": [contract["layers"][-1] for contract in contracts[:-1]],
    }
    config = type(student.config).from_dict({**student.config.to_dict(), **stitches})
    stitched = new_network(config, [len(contract["layers"]) for contract in contracts], seed=0)
    stitched.load_state_dict({**stitched.state_dict(), **student.state_dict()}, strict=True)
    for folder in folders:
        keep_stitches(stitched, folder)
    return stitched
