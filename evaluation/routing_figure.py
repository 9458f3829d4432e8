"""Figure of a V-MoE's routing: the experts of each patch, drawn on the images, and the experts of each class."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.patheffects import withStroke

from m2mkd.configuration.configuration_vmoe import VMoEConfig
from m2mkd.evaluation.overlay import COLORS, choices, num_choices
from m2mkd.evaluation.picture import Pictures, draw_below, draw_picture


# What a patch shows, by the kind of router.
SHOWN = {
    "token_choice": "its experts side by side, the largest weight on the left",
    "expert_choice": "of the experts that take it, the one with the largest weight",
    "soft": "of all experts, which all see it, the one with the largest weight",
}
MOST_NAMED_CLASSES = 50
MOST_NUMBERED_COLUMNS = 16  # beyond, numbers hide the image; they are drawn only where colors do not suffice


def draw_routing(
    config: VMoEConfig,
    pictures: Pictures,
    weights: Mapping[int, torch.Tensor],
    shares: Mapping[int, torch.Tensor],
    class_names: Sequence[str],
    note: str = "",
) -> bytes:
    """
    Draw the routing of images, of a data set, or of both as PNG.

    Args:
        config (`VMoEConfig`)
        pictures (`Pictures`): Can be empty.
        weights (`Mapping[int, torch.Tensor]`): Of the pictures, see [`~m2mkd.evaluation.routing.patch_weights`].
        shares (`Mapping[int, torch.Tensor]`): See [`~m2mkd.evaluation.routing.specialisation`]; can be empty.
        class_names (`Sequence[str]`): The rows of `shares`.
        note (`str`, *optional*): A line below the title.
    """
    columns = 1 + len(config.moe_layers)
    # cells of a readable size, up to a panel of 3.4 inches
    cells = max((num_choices(config) * of_layer.shape[1] ** 0.5 for of_layer in weights.values()), default=0)
    side = min(max(1.9, 0.12 * cells), 3.4)
    heights = [side * len(pictures) + 1.1] * bool(pictures)
    heights += [1.3 + min(0.22 * len(class_names) + 0.3, 8.0)] * bool(shares)
    figure = Figure(figsize=(max(side * columns, 6.5), sum(heights)), layout="constrained", dpi=110)
    parts = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if pictures:
        _draw_patches(next(parts), config, pictures, weights, note)
    if shares:
        _draw_classes(next(parts), config, shares, class_names)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


def _draw_patches(
    part: SubFigure, config: VMoEConfig, pictures: Pictures, weights: Mapping[int, torch.Tensor], note: str
) -> None:
    lines = [f"Routing: each patch shows {SHOWN[config.router_type]}", "(more opaque: larger weight)", note]
    part.suptitle("\n".join(filter(None, lines)), fontsize=9)
    panels = part.subplots(len(pictures), 1 + len(weights), squeeze=False)
    panels[0, 0].set_title("image", fontsize=9)
    has_dropped = False
    for row, (pixels, title) in enumerate(zip(pictures.pixels, pictures.titles, strict=True)):
        draw_picture(panels[row, 0], pixels, title)
    for column, (layer, of_layer) in enumerate(weights.items(), start=1):
        experts, opacity = choices(of_layer, num_choices(config))
        dropped = (opacity == 0).float().mean().item()
        has_dropped |= dropped > 0
        panels[0, column].set_title(
            f"layer {layer}" + (f": {100 * dropped:.0f} % dropped" * (dropped > 0)), fontsize=9
        )
        for panel, pixels, chosen, opaque in zip(panels[:, column], pictures.pixels, experts, opacity, strict=True):
            _draw_cells(panel, pixels, chosen.numpy(), opaque.numpy(), config)
    _draw_legend(part, config, has_dropped)


def _draw_cells(panel: Axes, pixels: np.ndarray, chosen: np.ndarray, opacity: np.ndarray, config: VMoEConfig) -> None:
    """Draw a cell for each choice of each patch; both arrays are `(num_patches, num_choices)`."""
    left, right, bottom, top = extent = draw_below(panel, pixels)
    rows, columns = _grid(len(chosen), *pixels.shape[:2])
    palette = np.array([to_rgb(color) for color in COLORS])
    cells = np.concatenate([palette[chosen % len(COLORS)], opacity[..., None]], axis=-1).reshape(rows, -1, 4)
    panel.imshow(cells, extent=extent, interpolation="nearest", aspect="equal")
    line = {"color": "white", "linewidth": 1.2 if rows <= 8 else 0.5}
    width, height = (right - left) / cells.shape[1], (bottom - top) / rows
    panel.vlines(left + np.arange(1, columns) * (right - left) / columns, top, bottom, **line)
    panel.hlines(top + np.arange(1, rows) * height, left, right, **line)
    halo = [withStroke(linewidth=2, foreground="white")]
    is_numbered = cells.shape[1] <= MOST_NUMBERED_COLUMNS or config.num_experts > len(COLORS)
    text = {"ha": "center", "va": "center", "path_effects": halo, "fontsize": min(8.0, 60 / cells.shape[1])}
    for place, (expert, opaque) in enumerate(zip(chosen.flat, opacity.flat, strict=True)):
        x, y = left + (place % cells.shape[1] + 0.5) * width, top + (place // cells.shape[1] + 0.5) * height
        if opaque == 0:
            panel.plot(x, y, "x", color="black", markersize=min(6.0, 50 / cells.shape[1]), path_effects=halo)
        elif is_numbered:
            panel.text(x, y, str(expert), **text)
    panel.set(xlim=(left, right), ylim=(bottom, top))


def _grid(num_patches: int, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of the patches, which are square."""
    rows = round((num_patches * height / width) ** 0.5)
    return rows, num_patches // rows


def _draw_legend(part: SubFigure, config: VMoEConfig, has_dropped: bool) -> None:
    shown = range(min(config.num_experts, len(COLORS)))
    keys: list[Patch | Line2D] = [Patch(color=COLORS[expert], label=f"expert {expert}") for expert in shown]
    if config.num_experts > len(COLORS):
        keys.append(Patch(color="none", label=f"… to {config.num_experts - 1}, as numbered; colors repeat"))
    if has_dropped:
        what = "no expert takes it" if config.router_type == "expert_choice" else "dropped: its expert has no room"
        keys.append(Line2D([], [], color="black", marker="x", linestyle="none", label=what))
    part.legend(handles=keys, loc="outside lower center", ncols=5, fontsize=8, frameon=False)


def _draw_classes(
    part: SubFigure, config: VMoEConfig, shares: Mapping[int, torch.Tensor], class_names: Sequence[str]
) -> None:
    what = "mean weight of each expert" if config.router_type == "soft" else "patches that each expert sees (%)"
    part.suptitle(f"Specialisation: {what}, by class", fontsize=9)
    panels = part.subplots(1, len(shares), squeeze=False, sharey=True)[0]
    largest = max(share.nan_to_num().max().item() for share in shares.values())
    for panel, (layer, share) in zip(panels, shares.items(), strict=True):
        image = panel.imshow(100 * share.numpy(), vmin=0, vmax=100 * largest, cmap="cividis", aspect="auto")
        panel.set_title(f"layer {layer}", fontsize=9)
        panel.set_xlabel("expert", fontsize=8)
        panel.set_xticks(range(0, share.shape[1], 1 + share.shape[1] // 16))
        panel.tick_params(labelsize=7)
    if len(class_names) <= MOST_NAMED_CLASSES:
        panels[0].set_yticks(range(len(class_names)), class_names)
    panels[0].set_ylabel("class", fontsize=8)
    part.colorbar(image, ax=panels, label="%").ax.tick_params(labelsize=7)
