"""Configurations of a recipe's networks."""

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
    Build the configuration of a network of the recipe for one data set.

    Args:
        spec (`NetworkSpec`)
        data (`DataConfig`): Data set that gives `image_size`.
        class_names (`Sequence[str]`): Class names that give the labels.

    Raises:
        `RecipeError`: the model's configuration does not have a field, or does not accept a value.
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
        raise RecipeError(
            f"The `config` of a {spec.model_type} sets {clash}, but these come from the data. Leave them out."
        )
    known = config_class().to_dict().keys() | config_class.__dataclass_fields__.keys()
    unknown = sorted(set(spec.config) - known)
    if unknown:
        raise RecipeError(
            f"A {spec.model_type} configuration has no field {unknown}. See {config_class.__name__} for its fields."
        )
    if spec.preset is not None and not hasattr(config_class, "from_preset"):
        raise RecipeError(f"A {spec.model_type} has no `preset`, only nac and vmoe do. Give the sizes in `config`.")
    # a DeiT has several model classes; transformers takes the first one listed here, otherwise the plain one
    fields = {"architectures": [], **spec.config, **own}
    try:
        if spec.preset is not None:
            return config_class.from_preset(spec.preset, **fields)
        return config_class(**fields)
    except Exception as error:
        # the strict dataclasses of huggingface_hub wrap the reason in their own errors
        raise RecipeError(f"The `config` of the {spec.model_type} is not valid: {error.__cause__ or error}") from error


def fit_to_data(network: PreTrainedModel, data: DataConfig, class_names: Sequence[str]) -> None:
    """
    Adapt a trained network in place to the image size and the class names of a data set.

    Raises:
        `StageError`: the images cannot be divided into whole patches.
    """
    fit_image_size(network, data.image_size)
    take_class_names(network.config, class_names)
