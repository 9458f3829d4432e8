"""Implementation of `m2mkd inspect`: pictures of what a V-MoE or a NAC does with images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from m2mkd.data.config import DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.decoding import decode_image
from m2mkd.data.processing import PixelTransform
from m2mkd.data.sources import load_images
from m2mkd.errors import DataError, StageError, WriteError
from m2mkd.evaluation.graph import signature_affinity
from m2mkd.evaluation.picture import Pictures
from m2mkd.evaluation.read_in import read_in_attention
from m2mkd.evaluation.read_in_figure import draw_read_in
from m2mkd.evaluation.routing import patch_weights, specialisation
from m2mkd.evaluation.routing_figure import draw_routing
from m2mkd.evaluation.saved_model import data_config, load_for_evaluation
from m2mkd.files import explained_write_errors, replaced_file
from m2mkd.modeling.modeling_nac import NACForImageClassification
from m2mkd.modeling.modeling_vmoe import VMoEForImageClassification


def inspect_folder(
    folder: str | Path,
    images: Sequence[str | Path],
    out: Path,
    source: str | None = None,
    split: str | None = None,
    batch_size: int = 64,
) -> None:
    """
    Draw what a saved model does with images: for a V-MoE, the experts of each patch in each sparse layer and the
    experts of each class of a data set; for a NAC, where its input latents look, and its graph.

    Args:
        folder (`str` or `Path`): A Hugging Face folder or a Hub id, with its image processor.
        images (`Sequence[str | Path]`): Image files. For a V-MoE with `source` it can be empty.
        out (`Path`): The PNG file to write.
        source (`str`, *optional*): Data source, as in a recipe, for the experts of each class.
        split (`str`, *optional*): Split of the data. `None`: its test split.
        batch_size (`int`): Images per batch of the data set.

    Raises:
        `WriteError`: `out` exists, is no `.png`, or cannot be written.
        `DataError`: an image, the image processor or the data set cannot be read, or there is nothing to draw.
        `StageError`: the model cannot be loaded, or is neither a V-MoE nor a NAC.
    """
    if out.suffix.lower() != ".png":
        raise WriteError(f"{out} is no PNG file. Give a name that ends in .png.")
    if out.exists():
        raise WriteError(f"{out} already exists. Give a new file, or delete it.")
    if not images and source is None:
        raise DataError("There is nothing to draw. Give at least one image, or a data set with --data.")
    missing = [str(image) for image in images if not Path(image).is_file()]
    if missing:
        raise DataError(f"There is no image file {', '.join(missing)}. Check the path.")
    decoded = [decode_image(str(image)) for image in images]
    model, pixels = load_for_evaluation(folder)
    if type(model) not in DRAWN:
        raise StageError(
            f"{folder} holds a {type(model).__name__}, which has no experts and no graph. Give the folder of a V-MoE "
            "or of a NAC."
        )
    model = model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()
    dataset = None
    if source is not None:
        config = data_config(source, pixels, split)
        dataset = ImageDataset(load_images(config), config, train=False)
    transform = PixelTransform(DataConfig(source="x", **pixels))
    pixel_values = [transform(image) for image in decoded]
    shown = [
        np.clip(values.numpy().transpose(1, 2, 0) * pixels["std"] + pixels["mean"], 0, 1) for values in pixel_values
    ]
    pictures = Pictures(np.array(shown), [Path(image).name for image in images])
    drawn = DRAWN[type(model)](model, pictures, pixel_values, dataset, batch_size)
    with explained_write_errors(out), replaced_file(out) as temporary:
        temporary.write_bytes(drawn)


def _draw_vmoe(
    model: VMoEForImageClassification,
    pictures: Pictures,
    pixel_values: list[torch.Tensor],
    dataset: ImageDataset | None,
    batch_size: int,
) -> bytes:
    config, note = model.config, ""
    if not config.moe_layers:
        raise StageError("This V-MoE has no sparse layer (`moe_layers` is empty), so there is no routing to draw.")
    if config.router_group_size is not None:
        note = f"each image routed alone, not in groups of {config.router_group_size} tokens"
        model.set_router(router_group_size=None)
    weights = patch_weights(model, torch.stack(pixel_values).to(model.device)) if pictures else {}
    members = config.num_ensemble_members
    if members > 1:
        titles = [f"{title}, member {member}" for title in pictures.titles for member in range(members)]
        pictures = Pictures(pictures.pixels.repeat(members, axis=0), titles)
    shares = {} if dataset is None else specialisation(model, dataset, batch_size)
    return draw_routing(config, pictures, weights, shares, [] if dataset is None else dataset.data.class_names, note)


def _draw_nac(
    model: NACForImageClassification,
    pictures: Pictures,
    pixel_values: list[torch.Tensor],
    dataset: ImageDataset | None,
    batch_size: int,
) -> bytes:
    if dataset is not None:
        raise StageError("--data shows the experts of a V-MoE. A NAC has none: give images, and leave out --data.")
    attention = read_in_attention(model, torch.stack(pixel_values).to(model.device))
    return draw_read_in(pictures, attention, signature_affinity(model))


DRAWN: dict[type[PreTrainedModel], Callable[..., bytes]] = {
    VMoEForImageClassification: _draw_vmoe,
    NACForImageClassification: _draw_nac,
}
