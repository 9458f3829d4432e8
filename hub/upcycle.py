"""Implementation of `m2mkd upcycle`: the folder of a V-MoE that starts as a published dense classifier."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed
from transformers.image_processing_utils import BaseImageProcessor

from m2mkd.data.dataset import ImageDataset
from m2mkd.data.processing import pixels_of_processor
from m2mkd.data.sources import load_images
from m2mkd.distillation.load import load_network, load_processor
from m2mkd.distillation.meta_from_teacher import fit_image_size
from m2mkd.distillation.sizes import pair
from m2mkd.distillation.upcycling import logit_difference, upcycle
from m2mkd.errors import DataError, HubError
from m2mkd.evaluation.saved_model import data_config
from m2mkd.files import write_folder
from m2mkd.model_cards.parts import CARD_FILE
from m2mkd.model_cards.upcycled_card import upcycled_card


NUM_IMAGES = 256
NUM_NOISE_IMAGES = 16


def upcycle_folder(
    source: str,
    out: str | Path,
    layers: str = "every-other",
    data: str | None = None,
    split: str | None = None,
    centroids: bool = False,
    seed: int = 0,
    **options: Any,
) -> list[str]:
    """
    Upcycle a saved classifier, see [`upcycle`]. If its image processor gives another size than it was trained on, its
    position embeddings are interpolated first, as transformers does in each forward.

    Args:
        source (`str`): Folder or Hub id of the dense model.
        out (`str` or `Path`): Folder to create. It appears whole or not at all.
        layers (`str`): As for [`upcycle`]; a list is given as `"[1, 3]"`.
        data (`str`, *optional*): Source, as in a recipe, of up to 256 images on which the difference is measured.
            `None`: it is measured on noise.
        split (`str`, *optional*): Split of the data. `None`: its test split.
        centroids (`bool`): Whether the routers are made from these images.
        seed (`int`): Seed of the routers and of the noise.
        options: Other arguments of [`upcycle`].

    Returns:
        `list[str]`: Sentences that say what was built, and how far its logits are from the dense model's.

    Raises:
        `HubError`, `WriteError`: `out` already exists, or cannot be written.
        `StageError`, `DataError`: the model, its image processor or the data do not exist or do not fit.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise HubError(f"{out} already exists and is not empty. Give a new folder, or delete it.")
    if centroids and data is None:
        raise DataError("--centroids needs images whose tokens are clustered. Give them with --data.")
    dense, processor, problems = _load(source)
    if data is not None and processor is None:
        raise DataError(problems[0])
    set_seed(seed)
    images = None if data is None else _images(data, split, processor, source)
    student = upcycle(dense, layers=_layers(layers), router_images=images if centroids else None, **options)
    images = _noise(dense) if images is None else images
    kind = "images of noise" if data is None else "given images"
    difference = f"On {len(images)} {kind}, {logit_difference(student, dense, images)}"

    def write(temporary: Path) -> None:
        for part in (student, *([processor] if processor else [])):
            part.save_pretrained(temporary)
        card = upcycled_card(student.config, student.num_parameters(), source, out.name, difference)
        card.save(temporary / CARD_FILE)

    write_folder(out, write)
    return [f"A V-MoE with experts in layers {student.config.moe_layers} is in {out}.", difference, *problems]


def _load(source: str) -> tuple[PreTrainedModel, BaseImageProcessor | None, list[str]]:
    """A dense model for images of the size that its processor gives, the processor, and why there is none."""
    dense = load_network(source).eval()
    try:
        processor = load_processor(source)
    except DataError as error:
        return dense, None, [str(error)]
    fit_image_size(dense, pixels_of_processor(processor, source)["image_size"])
    return dense, processor, []


def _layers(text: str) -> str | list[int]:
    try:
        found = json.loads(text)
    except ValueError:  # a word, which `upcycle` knows or refuses
        return text
    return found if isinstance(found, list) else text


def _noise(dense: PreTrainedModel) -> torch.Tensor:
    return torch.randn(NUM_NOISE_IMAGES, dense.config.num_channels, *pair(dense.config.image_size))


def _images(data: str, split: str | None, processor: BaseImageProcessor, source: str) -> torch.Tensor:
    """Images spread over a whole set, because sets are often sorted by class."""
    config = data_config(data, pixels_of_processor(processor, source), split)
    dataset = ImageDataset(load_images(config), config, train=False)
    indices = torch.linspace(0, len(dataset) - 1, min(NUM_IMAGES, len(dataset))).long().tolist()
    return torch.stack([dataset[index]["pixel_values"] for index in indices])
