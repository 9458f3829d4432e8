"""What a conversion makes of tensors: a folder with a whole model, or with one stage of it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig, PreTrainedModel

from m2mkd.conversion.official_pixels import M2MKD_PIXELS, OfficialPixels
from m2mkd.distillation.pair_folder import make_contract, write_pair
from m2mkd.errors import ConversionError


Tensors = dict[str, torch.Tensor]
# What fills a folder, and what that is, in words.
Output = tuple[Callable[[Path], None], str]


@dataclass
class Position:
    """Where a stage belongs: `index` of `num_stages`, with its layers."""

    index: int
    num_stages: int
    layers: list[int]


def on_meta(model_class: type[PreTrainedModel], config: Callable[[], PreTrainedConfig]) -> PreTrainedModel:
    """A model of a configuration, without memory. Raises `ConversionError` if the configuration describes none."""
    try:
        with torch.device("meta"):
            return model_class(config())
    except ConversionError:
        raise
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        # the strict dataclasses of huggingface_hub wrap the reason in errors of their own
        reason = f"{type(error).__name__}: {error}" if error.__cause__ is None else error.__cause__
        raise ConversionError(f"the configuration does not describe a {model_class.__name__} ({reason}).") from error


def model_output(model: PreTrainedModel, tensors: Tensors, pixels: OfficialPixels = M2MKD_PIXELS) -> Output:
    """A model with its weights and its image processor."""
    model.load_state_dict(own_memory(tensors), strict=True, assign=True)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        pixels.processor(model.config).save_pretrained(folder)

    return write, f"{type(model).__name__} of {model.num_parameters() / 1e6:.1f} M parameters"


def stage_output(
    model: PreTrainedModel, position: Position, tensors: Tensors, stitches: Tensors, stitch_size: int
) -> Output:
    """A stage as `m2mkd.distillation.pair_folder` keeps it, with a config by which the Auto classes load it."""
    config = model.config
    config.architectures = [type(model).__name__]
    config.dtype = next(iter(tensors.values())).dtype
    # the official files do not say which teacher and meta model a student was distilled with
    contract = make_contract(config, position.index, position.num_stages, position.layers, stitch_size, stitches)

    def write(folder: Path) -> None:
        write_pair(folder, config, contract, own_memory(tensors), own_memory(stitches))
        M2MKD_PIXELS.processor(config).save_pretrained(folder)

    size = sum(tensor.numel() for tensor in (*tensors.values(), *stitches.values())) / 1e6
    what = f"Stage {position.index} of {position.num_stages} of a {type(model).__name__}"
    return write, f"{what} ({size:.1f} M parameters with its stitches)"


def own_memory(tensors: Tensors) -> Tensors:
    """Contiguous, and no two on one storage, as safetensors wants it. What is so already is not copied."""
    owned: Tensors = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.nbytes() != tensor.nbytes or storage.data_ptr() in storages:
            tensor = tensor.clone()
        storages.add(tensor.untyped_storage().data_ptr())
        owned[name] = tensor
    return owned
