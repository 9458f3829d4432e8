"""Implementation of `m2mkd evaluate`: a saved model on any data set, over the classes that both have."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from m2mkd.data.config import DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.imagenet_classes import imagenet_classes
from m2mkd.data.known_sets import known_set, splits_of
from m2mkd.data.labeled_images import LabeledImages
from m2mkd.data.metrics import effective_robustness
from m2mkd.data.processing import pixels_of_processor
from m2mkd.data.sources import load_images
from m2mkd.distillation.load import load_network, load_processor
from m2mkd.errors import DataError
from m2mkd.evaluation.predict import predict
from m2mkd.screen import Screen


def load_for_evaluation(folder: str | Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """
    Load a saved classifier and the description of the pixels that it takes (fields of `DataConfig`).

    Raises:
        `StageError`: there is no such model, or it lacks weights, such as those of a head.
        `DataError`: its folder has no image processor, or one that cannot be reproduced.
    """
    return load_network(folder), pixels_of_processor(load_processor(folder), str(folder))


def data_config(source: str, pixels: dict[str, Any], split: str | None = None, partial: bool = False) -> DataConfig:
    """
    A data set by its source, in its test split if none is named.

    Raises:
        `DataError`: the source or the split is not valid.
    """
    split = split or (splits_of(source) or [None])[-1]
    try:
        return DataConfig(source=source, split=split, partial=partial, **pixels)
    except ValidationError as error:
        raise DataError(f"{source}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from error


def class_names_of(model: PreTrainedModel, source: str) -> list[str]:
    """
    The names of a model's classes, as the data set `source` would call them.

    For a set of ImageNet classes these are WordNet ids; a model of 1,000 or 200 classes with other names is taken to
    have those of ImageNet-1k or Tiny-ImageNet in their usual order.
    """
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    known = known_set(source)
    if known is None or known.marks is None or set(names) & set(imagenet_classes()):
        return names
    spaces = {len(space): space for space in (imagenet_classes(), imagenet_classes("tiny"))}
    return spaces.get(len(names), names)


def shared_classes(data: LabeledImages, class_names: Sequence[str], source: str) -> LabeledImages:
    """
    Select the images whose class the model knows, and give them the model's labels.

    Raises:
        `DataError`: the model knows none of the classes.
    """
    if not set(data.class_names) & set(class_names):
        raise DataError(
            f"the model knows none of the classes of {source}: it has {', '.join(class_names[:3])}, …, the data have "
            f"{', '.join(data.class_names[:3])}, …. Classes are matched by name; use data with the model's class names"
        )
    return data.of_classes(class_names)


def evaluate_folder(
    folder: str | Path,
    sources: Sequence[str],
    split: str | None = None,
    partial: bool = False,
    batch_size: int = 64,
    iid_accuracy: float | None = None,
    baselines: Sequence[tuple[float, float]] = (),
) -> dict[str, dict[str, Any]]:
    """
    Evaluate a saved model on whole data sets.

    Args:
        folder (`str` or `Path`): A Hugging Face folder or a Hub id, with its image processor.
        sources (`Sequence[str]`): Data sources, as in a recipe.
        split (`str`, *optional*): Split of every set. `None`: its test split (`"val"` of ImageNet and Tiny-ImageNet).
        partial (`bool`): Whether to accept copies of published sets that lack classes or images.
        batch_size (`int`): Images per device.
        iid_accuracy (`float`, *optional*): The model's accuracy on unshifted images, in [0, 1].
        baselines (`Sequence[tuple[float, float]]`): IID and OOD accuracies of other models.

    Returns:
        By source: `accuracy` and `top5_accuracy` in [0, 1] over the shared classes, `loss`, `n`, the number of shared
        classes `classes`, the number of images of other classes `left_out`, and `per_class` (by name: `accuracy`,
        `n`). With `iid_accuracy` also the `accuracy_gap` to it, and with `baselines` as well the
        `effective_robustness`.

    Raises:
        `DataError`, `StageError`: a set or the model cannot be loaded, or they share no class.
    """
    # not to the standard output, which may be JSON for another program
    screen = Screen(sys.stderr)
    model, pixels = load_for_evaluation(folder)
    results = {}
    for source in sources:
        config = data_config(source, pixels, split, partial)
        whole, class_names = load_images(config), class_names_of(model, source)
        data = shared_classes(whole, class_names, source)
        screen.say(f"Evaluating {folder} on {source}: {len(data):,} images")
        use_cpu = not torch.accelerator.is_available()
        predictions = predict(model, ImageDataset(data, config, train=False), batch_size, use_cpu)
        result: dict[str, Any] = {
            **predictions.summary(),
            "classes": predictions.classes,
            "left_out": len(whole) - len(data),
            "per_class": predictions.per_class(class_names),
        }
        if iid_accuracy is not None:
            result["accuracy_gap"] = result["accuracy"] - iid_accuracy
            if baselines:
                result["effective_robustness"] = effective_robustness(result["accuracy"], iid_accuracy, baselines)
        results[source] = result
    return results
