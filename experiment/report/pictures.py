"""Test images of report.html: what a model does with some of them, and those of its worst classes."""

import base64
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from m2mkd.data.config import DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.sources import load_images
from m2mkd.errors import DataError
from m2mkd.evaluation.overlay import overlays, paint
from m2mkd.evaluation.saved_model import load_for_evaluation
from m2mkd.experiment.artifact import EVAL_RESULTS, read_results


SHOWN_IMAGES = 6
WORST_CLASSES = 5
GAP = 8  # pixels between the pictures of a strip
IMAGES_OF_A_CLASS = 4
TRIED_IMAGES = 50  # of a class, to find wrong answers


@dataclass(frozen=True)
class Picture:
    """
    An image in a page.

    Attributes:
        uri: The PNG as `data:` address.
        text: What it shows, in words.
        caption: Below it.
    """

    uri: str
    text: str
    caption: str


class ShownImages:
    """
    Images of a test set, as a saved model sees them.

    Args:
        config (`DataConfig`): The test set.
        folder (`Path`): Folder of the model, an arm of a run.

    Raises:
        `DataError`: the test set cannot be loaded, or it is a stream.
        `StageError`: the model cannot be loaded.
    """

    def __init__(self, config: DataConfig, folder: Path):
        if config.streaming:
            raise DataError(f"{config.source} is a stream, of which no single images are shown")
        self.folder, (model, pixels) = folder, load_for_evaluation(folder)
        self.model, self.names = (
            model.eval(),
            [model.config.id2label[label] for label in range(model.config.num_labels)],
        )
        config = config.model_copy(update=pixels)
        self.dataset = ImageDataset(load_images(config).relabel(self.names), config, train=False)

    def spread(self, number: int) -> list[int]:
        """Positions of `number` images of different classes, as far as there are as many."""
        labels = self.dataset.data.labels
        first = np.unique(labels, return_index=True)[1]
        chosen = first[np.linspace(0, len(first) - 1, min(number, len(first))).round().astype(int)]
        return [int(place) for place in chosen]

    def image(self, position: int) -> Image.Image:
        """An image as the model sees it, cut and scaled."""
        config = self.dataset.config
        pixels = self.dataset[position]["pixel_values"].numpy().transpose(1, 2, 0) * config.std + config.mean
        return Image.fromarray((255 * np.clip(pixels, 0, 1)).round().astype(np.uint8))

    def routing(self) -> list[dict[str, Any]]:
        """Of some images: `image` (a [`Picture`]) and `overlays` (pictures)."""
        rows, positions = [], self.spread(SHOWN_IMAGES)
        for position, answer in zip(positions, self._answers(positions), strict=True):
            image, found = self.image(position), overlays(self.model, self._pixel_values([position]))
            if found:
                drawn = [Picture(png_uri(png(paint(image, own))), own.text, own.name) for own in found]
                rows.append({"image": self._picture(position, *answer), "overlays": drawn})
        return rows

    def strip(self, number: int) -> bytes | None:
        """
        `number` images, each beside what the model does with it, as one PNG; `None` for a model without experts and
        without latents.
        """
        rows = []
        for position in self.spread(number):
            image, found = _enlarged(self.image(position)), overlays(self.model, self._pixel_values([position]))
            rows.append([image, *(paint(image, own) for own in found)])
        if len(rows[0]) == 1:
            return None
        width, height = (max(edges) + GAP for edges in zip(*(own.size for row in rows for own in row), strict=True))
        whole = Image.new("RGB", (width * len(rows[0]) - GAP, height * len(rows) - GAP), "white")
        for y, row in enumerate(rows):
            for x, own in enumerate(row):
                whole.paste(own, (x * width, y * height))
        return png(whole)

    def worst(self) -> list[dict[str, Any]]:
        """
        The classes with the lowest accuracy, worst first: `name`, `accuracy`, `n`, and `images` (pictures), those that
        the model gets wrong first.
        """
        by_class = read_results(self.folder, EVAL_RESULTS).get("per_class") or {}
        rows = []
        for name, result in sorted(by_class.items(), key=lambda item: item[1]["accuracy"])[:WORST_CLASSES]:
            places = np.flatnonzero(self.dataset.data.labels == self.names.index(name))[:TRIED_IMAGES].tolist()
            answered = sorted(zip(places, self._answers(places), strict=True), key=lambda found: found[1][0] == name)
            images = [self._picture(place, *answer) for place, answer in answered[:IMAGES_OF_A_CLASS]]
            rows.append({"name": name, **result, "images": images})
        return rows

    def _pixel_values(self, positions: list[int]) -> torch.Tensor:
        return torch.stack([self.dataset[position]["pixel_values"] for position in positions])

    @torch.no_grad()
    def _answers(self, positions: list[int]) -> list[tuple[str, float]]:
        """The class that the model gives each image, and its probability."""
        best = self.model(self._pixel_values(positions)).logits.softmax(dim=-1).max(dim=-1)
        names = [self.names[label] for label in best.indices.tolist()]
        return list(zip(names, best.values.tolist(), strict=True))

    def _picture(self, position: int, answer: str, probability: float) -> Picture:
        name, sure = self.names[self.dataset.data.labels[position]], f"{100 * probability:.0f} %"
        text = f"test image of class {name}; the model says {answer} with probability {sure}"
        caption = f"{name}: {'✓' if answer == name else '✗'} {answer} ({sure})"
        return Picture(png_uri(png(_enlarged(self.image(position)))), text, caption)


def _enlarged(image: Image.Image, side: int = 168) -> Image.Image:
    scale = side / max(image.size)
    return image if scale <= 1 else image.resize(tuple(round(scale * edge) for edge in image.size), 0)


def png(image: Image.Image) -> bytes:
    """An image as PNG."""
    file = io.BytesIO()
    image.save(file, format="png")
    return file.getvalue()


def png_uri(content: bytes) -> str:
    """A PNG as an address that needs no file."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"
