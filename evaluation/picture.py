"""What the figures of single images share."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes


@dataclass(frozen=True)
class Pictures:
    """
    Images as a model sees them.

    Attributes:
        pixels: float32 `(n, height, width, 3)` in [0, 1].
        titles: A name for each.
    """

    pixels: np.ndarray
    titles: Sequence[str]

    def __len__(self) -> int:
        return len(self.titles)


def draw_picture(panel: Axes, pixels: np.ndarray, title: str) -> None:
    """Draw an image without ticks, its name on the left."""
    panel.imshow(pixels)
    panel.set_ylabel(title if len(title) <= 24 else f"{title[:11]}…{title[-12:]}", fontsize=8)
    panel.set(xticks=[], yticks=[])


def draw_below(panel: Axes, pixels: np.ndarray) -> tuple[float, float, float, float]:
    """Draw an image pale and grey, for colors above it. Returns the `extent` of what lies above."""
    height, width = pixels.shape[:2]
    panel.imshow(0.6 + 0.4 * pixels.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
    panel.set(xticks=[], yticks=[])
    return (-0.5, width - 0.5, height - 0.5, -0.5)
