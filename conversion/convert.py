"""What `m2mkd convert` does: an official checkpoint and its configuration to a Hugging Face folder, strictly."""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedConfig, PreTrainedModel, ViTForImageClassification

from m2mkd.conversion.official_models import (
    OfficialArguments,
    assemble_stages,
    check_tensors,
    convert_vit,
    convert_vmoe,
    convert_vmoe_student,
    shapes_of,
    stitch_shapes,
    vit_config,
    vit_to_official,
    vmoe_config,
    vmoe_student_config,
    vmoe_to_official,
    without_aliases,
)
from m2mkd.conversion.official_nac import (
    convert_nac,
    convert_nac_student,
    nac_config,
    nac_student_shapes,
    nac_students_config,
    nac_to_official,
)
from m2mkd.conversion.official_pixels import M2MKD_PIXELS, VMOE_JAX_PIXELS, OfficialPixels
from m2mkd.conversion.vmoe_jax import check_vmoe_jax, convert_vmoe_jax, plain_names, vmoe_jax_config
from m2mkd.distillation.pair_folder import CONTRACT_FILE, STAGE_FILE, STITCHES_FILE, make_contract
from m2mkd.distillation.split import split_into_stages
from m2mkd.errors import ConversionError
from m2mkd.files import explained_write_errors
from m2mkd.modeling.modeling_nac import NACForImageClassification
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification


Tensors = dict[str, torch.Tensor]


KINDS = ("nac", "nac-student", "vmoe", "vmoe-student", "vit", "vmoe-jax")
# Stages of the paper's students, where nothing else says how many there are.
NUM_STAGES = {"nac-student": 10, "vmoe-student": 4}
_ROLES = ("readin", "mediator", "readout")


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


@dataclass
class Position:
    """Where a stage belongs: `index` of `num_stages`, with its layers."""

    index: int
    num_stages: int
    layers: list[int]


def convert(
    kind: str,
    config_path: Path,
    checkpoint_path: Path,
    out: Path,
    stage: int | None = None,
    num_stages: int | None = None,
) -> str:
    """
    Convert an official checkpoint.

    Args:
        kind (`str`): What the checkpoint holds, one of `KINDS`.
        config_path (`Path`): An official YAML file, or a JSON file with the constructor's arguments.
        checkpoint_path (`Path`): `.pth`, `.pt`, `.safetensors` or `.npz`.
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
        raise ConversionError(f"{out} is there already and not empty. Give a new folder, or delete it.")
    content, checkpoint = read_config(config_path), read_checkpoint(checkpoint_path)
    try:
        if kind == "nac":
            write, what = _nac(content, checkpoint)
        elif kind == "nac-student":
            write, what = _nac_student(content, checkpoint, checkpoint_path, stage, num_stages)
        elif kind == "vmoe-jax":
            write, what = _vmoe_jax(content, checkpoint)
        elif kind == "vmoe-student":
            write, what = _vmoe_student(content, checkpoint, checkpoint_path, stage, num_stages)
        else:
            write, what = _transformer(kind, content, checkpoint, stage)
    except ConversionError as error:
        raise ConversionError(f"{checkpoint_path} with {config_path}: {error}") from error
    _write(out, write)
    return f"{what} is in {out}."


# ---- Reading ----


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
            f"{path} is no checkpoint of plain tensors, and nothing in it is run (weights_only=True). Either it is "
            "damaged, or it holds objects beside tensors: then load it where you trust it and save its state dict "
            f"alone. torch says: {reason}"
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
        raise ConversionError(f"{path} is damaged or no checkpoint: {reason}") from error
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
            raise ConversionError(f"`model_stages` of {path} is no list of state dicts.")
        model = _state_dict(content, "model", path) if content.get("model") is not None else None
        return Checkpoint(model=model, stages=[dict(stage) for stage in stages])
    return Checkpoint(model=dict(content))


def _state_dict(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    if not isinstance(content[name], Mapping):
        raise ConversionError(f"`{name}` of {path} is no state dict, but a {type(content[name]).__name__}.")
    return dict(content[name])


def _section(content: Mapping[str, Any], *path: str) -> dict[str, Any]:
    """A section below the dotted path. Raises `ConversionError`."""
    value: Any = content
    for name in path:
        value = value.get(name) if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping):
        raise ConversionError(f"the configuration has no section `{'.'.join(path)}`; it has {sorted(content)}.")
    return dict(value)


# ---- Whole models ----


def described_model(kind: str, content: dict[str, Any], official: Mapping[str, Any]) -> PreTrainedModel:
    """
    The whole model that a configuration describes, on the meta device.

    Args:
        kind (`str`): `"nac"`, `"vmoe"` or `"vit"`.
        content (`dict`): What [`read_config`] read.
        official (`Mapping[str, Any]`): Its tensors, which say where a V-MoE keeps stitches if `content` does not.

    Raises:
        `ConversionError`: the configuration describes no such model.
    """
    if kind == "nac":
        kwargs = _section(content, "model", "kwargs") if "model" in content else _section(content, "kwargs")
        # of an official YAML file; in the fixtures the name stands for something else
        losses = graph_loss_fields(content["criterion"]) if isinstance(content.get("criterion"), Mapping) else {}
        return _on_meta(NACForImageClassification, lambda: nac_config(kwargs, **losses))
    model_class = ViTForImageClassification if kind == "vit" else VMoEForImageClassification
    kwargs = _section(content, "kwargs")
    return _on_meta(model_class, lambda: _transformer_config(kind, content, kwargs, official))


def official_tensors(model: PreTrainedModel) -> Tensors:
    """The tensors of a whole model by their official names, without aliases."""
    if isinstance(model, NACForImageClassification):
        return nac_to_official(model.state_dict(), model.config)
    to_official = vit_to_official if isinstance(model, ViTForImageClassification) else vmoe_to_official
    return to_official(model.state_dict())


def _nac(content: dict[str, Any], checkpoint: Checkpoint) -> tuple[Callable[[Path], None], str]:
    official = _model_of(checkpoint)
    model = described_model("nac", content, official)
    check_tensors(official, shapes_of(official_tensors(model)), "the NAC")
    return _whole(model, convert_nac(official, model.config.share_propagators))


def graph_loss_fields(criterion: Mapping[str, Any]) -> dict[str, Any]:
    """
    The losses of the graph that an official training weighs, as fields of [`NACConfig`].

    Args:
        criterion (`Mapping[str, Any]`): `criterion` of an official YAML file.

    Raises:
        `ConversionError`: a loss or an option of it that we do not have.
    """
    loss = OfficialArguments(criterion, "criterion.").section("graph_sparsity")
    if not loss.take("use", False):
        return {}
    kind, weight = loss.take("type", "signature_hinge_repulsion"), loss.take("weight", 1.0)
    options = loss.section("kwargs")
    if kind == "signature_hinge_repulsion":
        fields = {"signature_repulsion_coef": weight, "signature_repulsion_hinge": loss.need("hinge")}
        options.require("reduction", "sum")
    elif kind == "stochastic_block_model_regularization":
        fields = {
            "block_model_coef": weight,
            "block_model_num_clusters": options.take("num_clusters", 10),
            "block_model_p_in": options.take("p_in", 0.9),
            "block_model_p_out": options.take("p_out", 0.05),
        }
        for latents, value in (("input", False), ("mediator", True), ("output", False)):
            if options.take(f"regularize_{latents}_latents", True) != value:
                raise ConversionError("our block model loss is of the mediators alone, the official one is not.")
        options.require("clip", None)
    else:
        raise ConversionError(f"`criterion.graph_sparsity.type` {kind!r} is not known.")
    options.end()
    loss.end()
    return fields


def _transformer(
    kind: str, content: dict[str, Any], checkpoint: Checkpoint, stage: int | None
) -> tuple[Callable[[Path], None], str]:
    """A ViT or V-MoE, whole or one stage of it."""
    kwargs = _section(content, "kwargs")
    depths = checkpoint.depths or kwargs.get("divided_depths") or []
    to_ours, to_official = (convert_vit, vit_to_official) if kind == "vit" else (convert_vmoe, vmoe_to_official)
    if checkpoint.block is not None:
        if stage is not None and stage != checkpoint.block_index:
            raise ConversionError(f"--stage is {stage}, but the checkpoint holds stage {checkpoint.block_index}.")
        stage = checkpoint.block_index
    if stage is None:
        official = _model_of(checkpoint, depths)
    else:
        official = without_aliases(_stage_of(checkpoint, stage, depths))
    model = described_model(kind, content, official)
    if stage is None:
        check_tensors(official, shapes_of(official_tensors(model)), f"the {kind}")
        return _whole(model, to_ours(official))
    if sum(depths) != model.config.num_hidden_layers:
        raise ConversionError(f"the checkpoint's depths are {depths}, the configuration's {kwargs['divided_depths']}.")
    offset = sum(depths[:stage])
    part = split_into_stages(model, depths)[stage]
    check_tensors(official, shapes_of(to_official(part.state_dict(), offset)), f"stage {stage} of the {kind}")
    position = Position(stage, len(depths), list(range(offset, offset + depths[stage])))
    return _part(model, position, to_ours(official, offset), {}, model.config.hidden_size)


def _transformer_config(
    kind: str, content: dict[str, Any], kwargs: dict[str, Any], official: Mapping[str, Any]
) -> PreTrainedConfig:
    norm_eps = _norm_eps(content)
    if kind == "vit":
        return vit_config(kwargs, norm_eps)
    if kwargs.get("pre_stitch_pos") is None and kwargs.get("post_stitch_pos") is None:
        # not said in the configuration, and plain from the checkpoint
        kwargs = {**kwargs, **_kept_stitches(official)}
    return vmoe_config(kwargs, norm_eps)


def _kept_stitches(official: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for side, shape_index in (("pre", 1), ("post", 0)):
        weights = {
            int(match[1]): tensor
            for name, tensor in official.items()
            if (match := re.fullmatch(rf"blocks\.(\d+)\.{side}_stitch\.fc\.weight", name))
        }
        if weights:
            found[f"{side}_stitch_pos"] = sorted(weights)
            found["stitch_dim"] = next(iter(weights.values())).shape[shape_index]
    return found


def _norm_eps(content: Mapping[str, Any]) -> float:
    if content.get("norm_eps") is None:
        raise ConversionError(
            "the configuration has no `norm_eps`. The weights do not show it: 1e-6 in ViT-Large and all V-MoEs, 1e-5 "
            "in ViT-Huge."
        )
    return content["norm_eps"]


def _vmoe_jax(content: dict[str, Any], checkpoint: Checkpoint) -> tuple[Callable[[Path], None], str]:
    """A V-MoE of google-research/vmoe."""
    arrays = plain_names(_model_of(checkpoint))
    model = _on_meta(VMoEForImageClassification, lambda: vmoe_jax_config(arrays, content))
    converted = convert_vmoe_jax(arrays)
    check_vmoe_jax(converted, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()})
    return _whole(model, converted, VMOE_JAX_PIXELS)


def _model_of(checkpoint: Checkpoint, depths: list[int] | None = None) -> dict[str, Any]:
    """State dict of the whole model."""
    if checkpoint.model is not None:
        return without_aliases(checkpoint.model)
    if checkpoint.stages and depths and len(depths) == len(checkpoint.stages):
        return assemble_stages(checkpoint.stages, depths)
    raise ConversionError(
        "the checkpoint holds one stage of a split teacher (`block_state_dict`), no whole model."
        if checkpoint.block is not None
        else f"the checkpoint has no `model`, and {len(checkpoint.stages)} `model_stages` for the depths {depths}."
    )


def _stage_of(checkpoint: Checkpoint, stage: int, depths: list[int]) -> dict[str, Any]:
    """State dict of one stage, whose blocks count from 0."""
    if not isinstance(stage, int) or not 0 <= stage < len(depths):
        raise ConversionError(f"there is no stage {stage}; the depths {depths} make stages 0 to {len(depths) - 1}.")
    if checkpoint.block is not None:
        return checkpoint.block
    if checkpoint.stages:
        if len(checkpoint.stages) != len(depths):
            raise ConversionError(f"the checkpoint has {len(checkpoint.stages)} stages, the depths are {depths}.")
        return checkpoint.stages[stage]
    return _model_of(checkpoint)


# ---- Students ----


def _nac_student(
    content: dict[str, Any], checkpoint: Checkpoint, path: Path, stage: int | None, num_stages: int | None
) -> tuple[Callable[[Path], None], str]:
    spec = _section(content, "student") if "student" in content else content
    share, role = _section(spec, "share_kwargs"), spec.get("role")
    roles = {role: _section(spec, "role_kwargs")} if role else {name: spec[name] for name in _ROLES if name in spec}
    num_stages = _num_stages("nac-student", content, num_stages)
    known = _known_index(path, content, stage, num_stages)
    # all mediators have one form; read-in and read-out have one place
    index = {"readin": 0, "mediator": 1, "readout": num_stages - 1}.get(role) if known is None else known
    index = _checked_index(index, num_stages)
    its_role = _ROLES[(index > 0) + (index == num_stages - 1)]
    if its_role not in roles:
        raise ConversionError(
            f"stage {index} of {num_stages} is a {its_role}, and the configuration describes {sorted(roles)} only."
        )
    model = _on_meta(
        NACForImageClassification, lambda: nac_students_config(share, roles, num_hidden_layers=num_stages - 2)
    )
    official = _model_of(checkpoint)
    stitch_size = spec.get("stitch_dim") or _stitch_size(official, "post_stitch.weight", "pre_stitch.weight")
    expected = nac_student_shapes(model.state_dict(), model.config, index, num_stages, stitch_size)
    check_tensors(official, expected, f"the {its_role} student")
    tensors, stitches = convert_nac_student(official, index, num_stages)
    write, what = _part(model, Position(index, num_stages, [index]), tensors, stitches, stitch_size)
    is_guess = known is None and its_role == "mediator"
    return (
        write,
        f"{what}, which is taken for the first mediator (--stage says which one it is)," if is_guess else what,
    )


def _vmoe_student(
    content: dict[str, Any], checkpoint: Checkpoint, path: Path, stage: int | None, num_stages: int | None
) -> tuple[Callable[[Path], None], str]:
    spec = _section(content, "student") if "student" in content else content
    kwargs = _section(spec, "kwargs")
    num_stages = _num_stages("vmoe-student", content, num_stages)
    index = _checked_index(_known_index(path, {"idx": kwargs.get("idx"), **content}, stage, num_stages), num_stages)
    norm_eps = _norm_eps(spec)
    model = _on_meta(VMoEForImageClassification, lambda: vmoe_student_config(kwargs, norm_eps, num_stages))
    depth = sum(kwargs["divided_depths"])
    part = split_into_stages(model, [depth] * num_stages)[index]
    offset = index * depth
    expected = shapes_of(vmoe_to_official(part.state_dict(), offset))
    official = without_aliases(_model_of(checkpoint, [depth]))
    names = (f"blocks.{depth - 1}.post_stitch.fc.weight", "blocks.0.pre_stitch.fc.weight")
    stitch_size = kwargs.get("stitch_dim") or _stitch_size(official, *names)
    for side, layer in (("pre", 0), ("post", depth - 1)):
        layers = kwargs.get(f"{side}_stitch_pos") or []
        if layers not in ([], [layer]):
            raise ConversionError(
                f"`{side}_stitch_pos` is {layers}; a student has its {side} stitch at block {layer} or none."
            )
        if layers:
            expected.update(stitch_shapes(side, stitch_size, model.config.hidden_size, layer))
    check_tensors(official, expected, f"the student of stage {index}")
    tensors, stitches = convert_vmoe_student(official, offset)
    position = Position(index, num_stages, list(range(offset, offset + depth)))
    return _part(model, position, tensors, stitches, stitch_size)


def _num_stages(kind: str, content: Mapping[str, Any], given: int | None) -> int:
    meta = content.get("meta")
    if given is None and isinstance(meta, Mapping) and "divided_depths" in meta:
        given = len(meta["divided_depths"])
    number, least = NUM_STAGES[kind] if given is None else given, 3 if kind == "nac-student" else 1
    if number < least:
        raise ConversionError(f"--num-stages must be at least {least}, but is {number}.")
    return number


def _known_index(path: Path, content: Mapping[str, Any], given: int | None, num_stages: int) -> int | None:
    """Which stage a student is: as said, else by the file's name, else by the configuration."""
    if given is not None:
        return given
    name = re.match(r"(ReadIn|Mediator|ReadOut)Student(?:_(\d+))?$", path.stem)
    if name and (name[1] != "Mediator" or name[2]):
        return int(name[2]) if name[1] == "Mediator" else {"ReadIn": 0, "ReadOut": num_stages - 1}[name[1]]
    index = content.get("idx")
    return index % num_stages if index is not None and index < 0 else index


def _checked_index(index: int | None, num_stages: int) -> int:
    if index is None:
        raise ConversionError(
            "neither the name of the checkpoint (ReadInStudent, MediatorStudent_3, ReadOutStudent) nor the "
            "configuration says which stage it is. Give --stage, from 0."
        )
    if not 0 <= index < num_stages:
        raise ConversionError(f"there is no stage {index} of {num_stages}. Give --stage and --num-stages.")
    return index


def _stitch_size(official: Mapping[str, Any], post: str, pre: str) -> int:
    """Width of the meta model, from the shape of a stitch; 0 if there is none."""
    if getattr(official.get(post), "ndim", 0) == 2:
        return official[post].shape[0]
    return official[pre].shape[1] if getattr(official.get(pre), "ndim", 0) == 2 else 0


# ---- Writing ----


def _on_meta(model_class: type[PreTrainedModel], config: Callable[[], PreTrainedConfig]) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            return model_class(config())
    except ConversionError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        # the strict dataclasses of huggingface_hub wrap the reason in errors of their own
        reason = f"{type(error).__name__}: {error}" if error.__cause__ is None else error.__cause__
        raise ConversionError(f"the configuration describes no {model_class.__name__} ({reason}).") from error


def _whole(
    model: PreTrainedModel, tensors: Tensors, pixels: OfficialPixels = M2MKD_PIXELS
) -> tuple[Callable[[Path], None], str]:
    model.load_state_dict(own_memory(tensors), strict=True, assign=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        pixels.processor(model.config).save_pretrained(folder)

    return write, f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f} M parameters"


def _part(
    model: PreTrainedModel, position: Position, tensors: Tensors, stitches: Tensors, stitch_size: int
) -> tuple[Callable[[Path], None], str]:
    """A stage as `m2mkd.distillation.pair_folder` keeps it, with a config by which the Auto classes load it."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = next(iter(tensors.values())).dtype
    # the official files do not say which teacher and meta model a student was distilled with
    contract = make_contract(config, position.index, position.num_stages, position.layers, stitch_size, stitches)

    def write(folder: Path) -> None:
        config.save_pretrained(folder)
        M2MKD_PIXELS.processor(config).save_pretrained(folder)
        save_file(own_memory(tensors), folder / STAGE_FILE, metadata={"format": "pt"})
        save_file(own_memory(stitches), folder / STITCHES_FILE, metadata={"format": "pt"})
        (folder / CONTRACT_FILE).write_text(json.dumps(contract, indent=2) + "\n")

    size = sum(tensor.numel() for tensor in (*tensors.values(), *stitches.values())) / 1e6
    what = f"Stage {position.index} of {position.num_stages} of a {type(model).__name__}"
    return write, f"{what} ({size:.1f} M parameters with its stitches)"


def own_memory(tensors: Tensors) -> Tensors:
    """Contiguous, and no two on one storage, as safetensors wants it."""
    return {name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}


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
