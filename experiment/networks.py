"""Builds the configurations of a recipe's networks."""

from collections.abc import Sequence

from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from m2mkd.data.config import DataConfig
from m2mkd.distillation.checks import take_class_names
from m2mkd.distillation.meta_from_teacher import fit_image_size
from m2mkd.errors import RecipeError
from m2mkd.experiment.recipe import NetworkSpec


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


def fit_to_data(network: PreTrainedModel, data: DataConfig, class_names: Sequence[str]) -> None:
    """
    Let a trained network take the images of a data set, and call its classes as the data do; in place.

    Raises:
        `StageError`: whole patches do not cover the images.
    """
    fit_image_size(network, data.image_size)
    take_class_names(network.config, class_names)
