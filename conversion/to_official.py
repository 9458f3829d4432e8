"""What `m2mkd convert --to-official` does: a folder of ours to a checkpoint that the official code loads, strictly."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from m2mkd.conversion.checkpoint_file import read_config
from m2mkd.conversion.convert import KINDS
from m2mkd.conversion.kind import ReversibleKind
from m2mkd.conversion.official_models import check_tensors, cut_in_stages, shapes_of, with_aliases
from m2mkd.conversion.output import own_memory
from m2mkd.distillation.load import load_network
from m2mkd.errors import ConversionError
from m2mkd.files import explained_write_errors, replaced_file


_KINDS = {name: kind for name, kind in KINDS.items() if isinstance(kind, ReversibleKind)}


def to_official(kind: str, config_path: Path, folder: Path, out: Path) -> str:
    """
    Convert a NAC, a V-MoE or a ViT (teacher or meta model) of ours to a checkpoint of the official code, which builds
    its models from arguments and takes from a checkpoint no more than tensors. So the arguments are needed, and tried:
    the model that they describe must give the logits of the one in `folder`.

    Args:
        kind (`str`): `"nac"`, `"vmoe"` or `"vit"`.
        config_path (`Path`): The official YAML file, or JSON with the constructor's arguments, as in [`convert`].
        folder (`Path`): What `save_pretrained` wrote.
        out (`Path`): A `.pth` file in the official trainer's layout, or a `.safetensors` file with the tensors only.

    Returns:
        `str`: What was written.

    Raises:
        `ConversionError`: the arguments are not those of the model, or `out` already exists; nothing is written.
        `StageError`: the folder cannot be loaded.
        `RunError`: the file cannot be written.
    """
    if kind not in _KINDS:
        raise ConversionError(f"--kind is {kind!r}; with --to-official it must be one of {', '.join(_KINDS)}.")
    if out.suffix not in (".pth", ".safetensors"):
        raise ConversionError(f"{out} must end in .pth, which the official code loads, or in .safetensors.")
    if out.exists():
        raise ConversionError(f"{out} already exists. Give a new name, or delete it.")
    converter = _KINDS[kind]
    content, model = read_config(config_path), _model_in(folder, converter)
    official = own_memory(converter.official_tensors(model))
    try:
        described = converter.described_model(content, official)
        check_tensors(official, shapes_of(converter.official_tensors(described)), f"the {kind}")
        _check_logits(model, described)
    except ConversionError as error:
        raise ConversionError(f"{folder} with {config_path}: {error}") from error
    _write(out, official, converter.official_depths(content))
    return f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f} M parameters is in {out}."


def _model_in(folder: Path, kind: ReversibleKind) -> PreTrainedModel:
    model = load_network(folder)
    if type(model) is not kind.model_class:
        raise ConversionError(
            f"{folder} holds a {type(model).__name__}, but --kind {kind.name} is {kind.model_class.__name__}."
        )
    for module in model.modules():
        # with the official noise in evaluation no two logits of a NAC are equal
        if hasattr(module, "sample_in_eval"):
            module.sample_in_eval = False
    return model.eval()


def _check_logits(model: PreTrainedModel, described: PreTrainedModel) -> None:
    """What tensors do not show (heads, epsilons, experts a token) must be the same as well."""
    described.load_state_dict(model.state_dict(), strict=True, assign=True)
    config = model.config
    size = config.image_size if isinstance(config.image_size, list | tuple) else [config.image_size] * 2
    pixel_values = torch.randn(1, config.num_channels, *size, dtype=model.dtype)
    with torch.no_grad():
        same = torch.equal(model(pixel_values).logits, described.eval()(pixel_values).logits)
    if not same:
        ours, theirs = config.to_dict(), described.config.to_dict()
        fields = [name for name in type(config).__annotations__ if ours.get(name) != theirs.get(name)]
        listed = ", ".join(f"{name} ({ours.get(name)!r}, described as {theirs.get(name)!r})" for name in fields)
        raise ConversionError(
            "the tensors fit, but the model that the configuration describes gives other logits. These fields differ: "
            f"{listed}."
        )


def _write(out: Path, official: dict[str, torch.Tensor], depths: list[int] | None) -> None:
    with explained_write_errors(out):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        with replaced_file(out) as temporary:
            if out.suffix == ".safetensors":
                save_file(official, temporary, metadata={"format": "pt"})
            elif depths is None:
                torch.save({"model": official}, temporary)
            else:
                stages = cut_in_stages(official, depths)
                torch.save({"model": with_aliases(official, depths), "model_stages": stages}, temporary)
