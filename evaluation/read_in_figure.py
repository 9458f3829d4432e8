"""Figure of a NAC: where its input latents look in each image, and the graph of its mediators."""

import io

import torch
from matplotlib.figure import Figure

from m2mkd.evaluation.graph import AFFINITY, draw_graph
from m2mkd.evaluation.overlay import selective
from m2mkd.evaluation.picture import Pictures, draw_below, draw_picture


MOST_LATENTS = 6


def draw_read_in(pictures: Pictures, attention: torch.Tensor, affinity: torch.Tensor) -> bytes:
    """
    Draw the mean attention of all input latents and that of single ones, and the graph, as PNG. Of many latents those
    with the least entropy are drawn, which look at the fewest tokens.

    Args:
        pictures (`Pictures`): At least one.
        attention (`torch.Tensor`): See [`~m2mkd.evaluation.read_in.read_in_attention`].
        affinity (`torch.Tensor`): See [`~m2mkd.evaluation.graph.signature_affinity`].
    """
    num_latents = attention.shape[1]
    latents = selective(attention, MOST_LATENTS)
    maps = torch.cat([attention.mean(dim=1, keepdim=True), attention[:, latents]], dim=1)
    # 1 where all tokens get as much
    maps = maps * attention[0, 0].numel()
    titles = [f"mean of {num_latents}", *(f"latent {latent}" for latent in latents)]

    columns, height = 1 + len(titles), 1.5 * len(pictures) + 0.8
    figure = Figure(figsize=(1.5 * columns + 1, height + 3.4), layout="constrained", dpi=110)
    above, below = figure.subfigures(2, 1, height_ratios=[height, 3.4])
    selected = f" (the {len(latents)} most selective of {num_latents})" if len(latents) < num_latents else ""
    above.suptitle(f"Read-in attention of the input latents{selected}", fontsize=9)
    panels = above.subplots(len(pictures), columns, squeeze=False)
    panels[0, 0].set_title("image", fontsize=9)
    for row, (pixels, name) in enumerate(zip(pictures.pixels, pictures.titles, strict=True)):
        draw_picture(panels[row, 0], pixels, name)
        for panel, shown, title in zip(panels[row, 1:], maps[row], titles, strict=True):
            extent = draw_below(panel, pixels)
            style = {"cmap": "viridis", "alpha": 0.65, "vmin": 0, "vmax": maps.max().item()}
            image = panel.imshow(shown.numpy(), extent=extent, interpolation="nearest", **style)
            if row == 0:
                panel.set_title(title, fontsize=9)
    above.colorbar(image, ax=panels, label="attention (1: uniform)", shrink=0.9)
    panel = below.subplots()
    graph = draw_graph(panel, "Graph of the first round", affinity)
    panel.set_ylabel("mediators")
    below.colorbar(graph, ax=panel, label=AFFINITY)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()
