"""Figure of a NAC's graph: how strongly each latent receives from each other one, before and after training."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from m2mkd.distillation.load import load_network
from m2mkd.distillation.split import new_network
from m2mkd.modeling.modeling_nac import NACForImageClassification


AFFINITY = "affinity exp(−distance / bandwidth)"


@torch.no_grad()
def signature_affinity(model: NACForImageClassification) -> torch.Tensor:
    """
    Compute the affinity of the mediators (rows) with all senders of the first round, input latents first, of shape
    `(num_mediator_latents, num_senders)`. It is 0 if two are not connected.
    """
    was_training = model.training
    model.eval()
    affinity = model.nac.log_affinities()[0].exp()
    model.train(was_training)
    return affinity.cpu()


def density(affinity: torch.Tensor) -> float:
    """Fraction of connected pairs among the mediators, without pairs of a latent with itself."""
    num_mediators = affinity.shape[0]
    among = affinity[:, -num_mediators:] > 0
    return ((among.sum() - among.diagonal().sum()) / max(num_mediators * (num_mediators - 1), 1)).item()


def read_graphs(arms: Mapping[str, Path], depths: Sequence[int], seed: int) -> dict[str, torch.Tensor]:
    """
    Compute the affinities of a NAC before training, and after the training of each arm.

    Args:
        arms (`Mapping[str, Path]`): Folders of the arms by name; at least one.
        depths (`Sequence[int]`): Depths of the student's stages.
        seed (`int`): Seed of its initial weights.
    """
    models = {name: load_network(folder) for name, folder in arms.items()}
    before = new_network(next(iter(models.values())).config, depths, seed)
    return {name: signature_affinity(model) for name, model in {"before training": before, **models}.items()}


def draw_graph(panel: Axes, title: str, affinity: torch.Tensor) -> AxesImage:
    """Draw a signature-kernel adjacency (see [`signature_affinity`]); what is not connected stays grey."""
    num_mediators, num_senders = affinity.shape
    shown = affinity.masked_fill(affinity == 0, torch.nan)
    image = panel.imshow(shown.numpy(), vmin=0, vmax=1, cmap="viridis_r", interpolation="nearest", aspect="auto")
    panel.set_facecolor("#f3f3f3")
    if num_senders > num_mediators:
        panel.axvline(num_senders - num_mediators - 0.5, color="#888888", linewidth=0.8)
    panel.set_title(f"{title}: {100 * density(affinity):.0f} % connected", fontsize=10)
    panel.set_xlabel("senders: input latents | mediators" if num_senders > num_mediators else "mediators")
    return image


def draw_graphs(affinities: Mapping[str, torch.Tensor]) -> bytes:
    """
    Draw the graphs of several models as PNG, one panel each.

    Args:
        affinities (`Mapping[str, torch.Tensor]`): By title, see [`signature_affinity`].
    """
    picture = io.BytesIO()
    with matplotlib.rc_context({"font.size": 9, "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(3.1 * len(affinities) + 0.8, 3.3), layout="constrained", dpi=130)
        panels = figure.subplots(1, len(affinities), squeeze=False)[0]
        for panel, (title, affinity) in zip(panels, affinities.items(), strict=True):
            image = draw_graph(panel, title, affinity)
        panels[0].set_ylabel("mediators")
        figure.colorbar(image, ax=panels, label=AFFINITY, shrink=0.9)
        figure.savefig(picture, format="png")
    return picture.getvalue()
