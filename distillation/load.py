"""Loading of saved classifiers."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import (
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    CLIPConfig,
    CLIPVisionConfig,
    PreTrainedConfig,
    PreTrainedModel,
    SiglipConfig,
    SiglipVisionConfig,
)
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from m2mkd.distillation.split import CAN_BE_CUT, stage_class
from m2mkd.errors import DataError, StageError
from m2mkd.files import check_inside, read_json


# The classifiers of these towers have the configuration of the whole model.
_WHOLE = {CLIPVisionConfig: CLIPConfig, SiglipVisionConfig: SiglipConfig}


def load_network(source: str | Path, **kwargs: Any) -> PreTrainedModel:
    """
    Load a trained classifier from a Hub id or folder. On the CPU, its tensors stay in the file until they are used, so
    a process that keeps one stage needs no memory for the others.

    Raises:
        `StageError`: there is no such model, its file is damaged, or it lacks weights, such as those of a head.
    """
    _check_files(source)
    try:
        model, info = AutoModelForImageClassification.from_pretrained(
            source, output_loading_info=True, trust_remote_code=False, **kwargs
        )
    except Exception as error:
        raise StageError(_why_no_model(source, error)) from error
    if info["missing_keys"]:
        raise _untrained(source, info["missing_keys"])
    return model


def load_network_config(source: str | Path) -> PreTrainedConfig:
    """
    Load the configuration of a trained classifier, and check that its file has all weights. The weights themselves are
    not read. For a Hub id that is not downloaded yet, the configuration tells whether it is a classifier.

    Raises:
        `StageError`: there is no such model, its file is damaged, or it lacks weights, such as those of a head.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
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


def _check_files(source: str | Path) -> None:
    """Refuse links, and names of weights in the index, that lead out of a model's folder."""
    folder = Path(source)
    if not folder.is_dir():
        return
    check_inside(folder, folder.glob("*.*"), StageError)
    if (folder / SAFE_WEIGHTS_INDEX_NAME).is_file():
        content = read_json(folder / SAFE_WEIGHTS_INDEX_NAME, StageError, "Save or fetch the model again.")
        files = content.get("weight_map")
        if not isinstance(files, dict) or not all(isinstance(name, str) for name in files.values()):
            raise StageError(f"{folder / SAFE_WEIGHTS_INDEX_NAME} has no `weight_map`. Save or fetch the model again.")
        check_inside(folder, [folder / name for name in set(files.values())], StageError)


def config_with_new_head(source: str | Path, class_names: Sequence[str]) -> PreTrainedConfig:
    """
    The configuration of a classifier on a pretrained backbone: a classifier for other classes, or a network without a
    head. Raises `StageError` if transformers has no classifier with such a backbone.
    """
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise StageError(_why_no_model(source, error)) from error
    if type(config) in _WHOLE:
        config = _WHOLE[type(config)](vision_config=config.to_dict())
    if type(config) not in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING:
        raise StageError(
            f"{source} is a {config.model_type}, for which transformers has no image classifier. Use one of "
            f"{CAN_BE_CUT}, or save a classifier of your own with `save_pretrained`."
        )
    config.id2label = dict(enumerate(class_names))
    config.label2id = {name: index for index, name in enumerate(class_names)}
    return config


def load_with_new_head(source: str | Path, class_names: Sequence[str]) -> PreTrainedModel:
    """
    Load a pretrained backbone under a new head, whose weights are random.

    Args:
        source (`str` or `Path`): Hub id or folder of a classifier for other classes or of a network without a head.
        class_names (`Sequence[str]`): The new classes, in order.

    Raises:
        `StageError`: there is no such model, or its file lacks other weights than those of a head.
    """
    _check_files(source)
    config = config_with_new_head(source, class_names)
    # the classifier on a vision tower holds the tower under a name of its own
    is_tower = config.model_type != AutoConfig.from_pretrained(source, trust_remote_code=False).model_type
    kind = AutoModel if is_tower else AutoModelForImageClassification
    own_config = {} if is_tower else {"config": config}
    try:
        model, info = kind.from_pretrained(
            source, **own_config, ignore_mismatched_sizes=True, output_loading_info=True, trust_remote_code=False
        )
    except Exception as error:
        raise StageError(_why_no_model(source, error)) from error
    if is_tower:
        tower, model = model, AutoModelForImageClassification.from_config(config)
        model.vision_model.load_state_dict(tower.state_dict())
    heads = {id(tensor) for head in stage_class(type(model)).classifiers_of(model) for tensor in head.parameters()}
    own = {name for name, tensor in model.named_parameters() if id(tensor) in heads}
    lacking = {*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])} - own
    if lacking:
        raise _untrained(source, lacking)
    return model


def _untrained(source: str | Path, missing: Iterable[str]) -> StageError:
    names = sorted(missing)
    shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return StageError(
        f"{source} is not a trained classifier: it has no weights for {shown}. They would be drawn at random each "
        "time. Train it first: load it with `AutoModelForImageClassification.from_pretrained`, fine-tune it with the "
        "`Trainer` of transformers, save it and its image processor with `save_pretrained`, and give that folder."
    )


def load_processor(source: str | Path) -> BaseImageProcessor:
    """Load the image processor of a saved network. Raises `DataError` if there is none."""
    try:
        return AutoImageProcessor.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{source} has no image processor that can be loaded, so its input size and normalization are unknown. "
            f"Save the one that it was trained with to that folder, with `save_pretrained`. ({error})"
        ) from error


def _why_no_model(source: str | Path, error: Exception) -> str:
    """Explain why there is no model to load, and what to do."""
    folder = Path(source)
    if "trust_remote_code" in str(error):
        return (
            f"The model {source} needs code from its repository, and m2mkd runs no such code. Give a model of a type "
            "that transformers or m2mkd knows."
        )
    if (folder / "config.json").is_file():
        return (
            f"The model {source} cannot be loaded: {error}. Its config.json and weights must be those of one saved "
            "classifier: save or fetch it again."
        )
    if folder.is_dir():
        arms = sorted(str(path.parent) for path in folder.glob("arms/*/config.json"))
        instead = f"one of this run's models: {', '.join(arms)}" if arms else "a folder that save_pretrained wrote"
        return f"There is no model in the folder {source}: it has no config.json. Give {instead}."
    try:
        validate_repo_id(str(source))
    except HFValidationError:
        return f"There is no folder {source}, and it is not a valid Hub id (name or user/name). Check the path."
    return f"There is no folder {source}, and the model cannot be loaded from the Hub: {error}"
