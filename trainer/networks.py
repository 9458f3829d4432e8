"""Builds, loads and saves the networks of a recipe."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_processing_utils import BaseImageProcessor

from m2mkd.data.config import DataConfig
from m2mkd.data.errors import DataError
from m2mkd.modeling.meta_from_teacher import fit_image_size
from m2mkd.modeling.pair_files import PairFileError, keep_stitches, read_contract
from m2mkd.modeling.stages import StageError, initialize_stage, split_into_stages
from m2mkd.trainer.recipe import NetworkSpec, RecipeError


def build_config(spec: NetworkSpec, data: DataConfig, class_names: Sequence[str]) -> PreTrainedConfig:
    """
    The configuration of a network of the recipe for one data set.

    Args:
        spec (`NetworkSpec`)
        data (`DataConfig`): Gives `image_size`.
        class_names (`Sequence[str]`): Give the labels.

    Raises:
        `RecipeError`: a field that the model's configuration lacks, or a value that it refuses.
    """
    own = {
        "image_size": data.image_size,
        "num_labels": len(class_names),
        "id2label": dict(enumerate(class_names)),
        "label2id": {name: index for index, name in enumerate(class_names)},
    }
    config_class = type(AutoConfig.for_model(spec.model_type))
    clash = sorted(set(own) & set(spec.config))
    if clash:
        raise RecipeError(f"The `config` of a {spec.model_type} sets {clash}; these come from the data.")
    known = config_class().to_dict().keys() | config_class.__dataclass_fields__.keys()
    unknown = sorted(set(spec.config) - known)
    if unknown:
        raise RecipeError(f"A {spec.model_type} configuration has no field {unknown}; look them up in {config_class}.")
    if spec.preset is not None and not hasattr(config_class, "from_preset"):
        raise RecipeError(f"`preset` is for nac and vmoe, not for {spec.model_type}; give the sizes in `config`.")
    # a DeiT has several classes, of which transformers takes the first that is listed here, or else the plain one
    fields = {"architectures": [], **spec.config, **own}
    try:
        if spec.preset is not None:
            return config_class.from_preset(spec.preset, **fields)
        return config_class(**fields)
    except Exception as error:
        # the strict dataclasses of huggingface_hub wrap the reason in errors of their own
        raise RecipeError(f"The `config` of the {spec.model_type} is refused: {error.__cause__ or error}") from error


def new_network(
    config: PreTrainedConfig, depths: Sequence[int], seed: int, indices: Sequence[int] | None = None
) -> PreTrainedModel:
    """
    A network with fresh weights, each stage drawn from a seed of its own.

    Args:
        config (`PreTrainedConfig`)
        depths (`Sequence[int]`): Layers of each stage.
        seed (`int`)
        indices (`Sequence[int]`, *optional*): Stages to materialise; the others stay on the meta device. `None`: all.
    """
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(config)
    for stage in split_into_stages(model, depths):
        # the first stage of a NAC holds the latents of all
        if indices is None or stage.index in indices or (config.model_type == "nac" and stage.is_first):
            initialize_stage(model, stage, seed)
    return model


def load_network(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    A trained classifier from a Hub id or folder. On the CPU its tensors stay in the file until they are used, so a
    process that keeps one stage does not pay for the others.

    Raises:
        `StageError`: there is no such model, its file is damaged, or it lacks weights, such as those of a head.
    """
    try:
        model, info = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True, **kwargs)
    except Exception as error:
        raise StageError(_why_no_model(source, error)) from error
    if info["missing_keys"]:
        raise _untrained(source, info["missing_keys"])
    return model


def load_network_config(source: str | Path) -> PreTrainedConfig:
    """
    The configuration of a trained classifier, after a look at what the classifier's file holds. No weights are read;
    of a Hub id that is not downloaded yet, the configuration tells whether it is a classifier.

    Raises:
        `StageError`: there is no such model, its file is damaged, or it lacks weights, such as those of a head.
    """
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise StageError(_why_no_model(source, error)) from error
    try:
        folder = source if Path(source).is_dir() else snapshot_download(str(source), local_files_only=True)
    except LocalEntryNotFoundError:
        folder = None
    if folder is not None and any(Path(folder).glob("*.safetensors")):
        load_network(source, device_map="meta", local_files_only=True)
    elif config.architectures and not any("ImageClassification" in name for name in config.architectures):
        raise _untrained(source, ["classifier"])
    return config


def _untrained(source: str | Path, missing: Iterable[str]) -> StageError:
    names = sorted(missing)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return StageError(
        f"{source} is not a trained classifier: it has no weights for {shown}. They would be drawn at random each "
        "time. Train it first: load it with `AutoModelForImageClassification.from_pretrained`, fine-tune it with the "
        "`Trainer` of transformers, save it and its image processor with `save_pretrained`, and give that folder."
    )


def load_processor(source: str | Path) -> BaseImageProcessor:
    """The image processor beside a saved network. Raises `DataError` if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(source)
    except Exception as error:
        raise DataError(
            f"{source} has no image processor that can be loaded, so its input size and normalization are unknown. "
            f"Save the one that it was trained with in that folder, with `save_pretrained`. ({error})"
        ) from error


def fit_to_data(network: PreTrainedModel, data: DataConfig, class_names: Sequence[str]) -> None:
    """
    Let a trained network take the images of a data set, and call its classes as the data do; in place.

    Raises:
        `StageError`: whole patches do not cover the images.
    """
    fit_image_size(network, data.image_size)
    take_class_names(network.config, class_names)


def _why_no_model(source: str | Path, error: Exception) -> str:
    """Why there is no model to load, and the way out."""
    folder = Path(source)
    if (folder / "config.json").is_file():
        return f"The model {source} cannot be loaded: {error}"
    if folder.is_dir():
        arms = sorted(str(path.parent) for path in folder.glob("arms/*/config.json"))
        instead = f"one of this run's models: {', '.join(arms)}" if arms else "a folder that save_pretrained wrote"
        return f"There is no model in the folder {source}: it has no config.json. Give {instead}."
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return f"There is no folder {source}, and it is no id on the Hub (name or user/name). Check the path."
    return f"There is no folder {source}, and no such model can be loaded from the Hub: {error}"


def take_class_names(config: PreTrainedConfig, class_names: Sequence[str]) -> None:
    """
    Call the classes of a published network as the data do, in order, if it has as many and shares no name with them:
    the Hub has other words for ImageNet's classes. Its accuracy tells whether the order is the same.

    Args:
        config (`PreTrainedConfig`): Changed in place.
        class_names (`Sequence[str]`): Of the data.
    """
    if len(class_names) == config.num_labels and set(class_names).isdisjoint(config.id2label.values()):
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: index for index, name in enumerate(class_names)}


def with_stitches(student: PreTrainedModel, folders: Sequence[Path]) -> PreTrainedModel:
    """
    A V-MoE once more, with the stitches of its pairs between its layers.

    Args:
        student (`PreTrainedModel`): Without stitches; the layers of its pairs are loaded.
        folders (`Sequence[Path]`): The folders of all its pairs, in their order.

    Raises:
        `PairFileError`: a file is damaged, or a stitch has no place, as in any other model than a V-MoE.
    """
    contracts = [read_contract(folder) for folder in folders]
    if student.config.model_type != "vmoe":
        raise PairFileError(
            f"A {student.config.model_type} has no place for stitches, only a vmoe keeps them. Leave them out."
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
