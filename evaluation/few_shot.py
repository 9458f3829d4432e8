"""Implementation of `m2mkd few-shot`: new heads on the frozen features of a saved model, for many small tasks."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Subset
from transformers import PreTrainedModel

from m2mkd.data.config import IMAGEFOLDER_PREFIX, DataConfig
from m2mkd.data.dataset import ImageDataset
from m2mkd.data.episodes import Episode, draw_episodes
from m2mkd.data.known_sets import splits_of
from m2mkd.data.sources import load_images
from m2mkd.distillation.split import stage_class
from m2mkd.evaluation.saved_model import data_config, load_for_evaluation
from m2mkd.screen import Screen


LABEL_SMOOTHING = 0.1
HEAD_STD = 0.02  # of the new head's weights


@dataclass(frozen=True)
class HeadTraining:
    """
    Settings of a head's training: each step takes the full batch; after the warm-up, the learning rate follows a
    cosine from `learning_rate` to `min_lr`.
    """

    optimizer: str
    learning_rate: float
    steps: int
    warmup_steps: int
    min_lr: float
    weight_decay: float


# The official settings (paper, few-shot adaptation; the code's FS phase).
ADAMW = HeadTraining("adamw", 2e-3, 100, 20, 1e-5, 0.05)
NAC_SGD = HeadTraining("sgd", 3e-4, 500, 0, 3e-4, 0.0)
HEADS = {how.optimizer: how for how in (ADAMW, NAC_SGD)}


def few_shot(
    folder: str | Path,
    source: str,
    ways: int = 8,
    shots: int = 5,
    episodes: int = 20,
    seed: int = 0,
    train_split: str | None = None,
    val_split: str | None = None,
    partial: bool = False,
    batch_size: int = 64,
) -> dict[str, Any]:
    """
    Measure the few-shot accuracy of a saved model. In each episode, a new linear head is trained on `shots` images per
    class of `ways` classes and tested on three times as many others. The model is frozen and its features are computed
    once, without augmentation.

    Args:
        folder (`str` or `Path`): A Hugging Face folder or a Hub id, with its image processor.
        source (`str`): Data source, as in a recipe.
        ways, shots, episodes, seed (`int`): See [`~m2mkd.data.episodes.draw_episodes`].
        train_split, val_split (`str`, *optional*): Splits to learn from and to test on. `None`: those of a published
            set. An image folder has only one split; both parts are drawn from it.
        partial (`bool`): Whether to accept a copy of a published set that lacks classes or images.
        batch_size (`int`): Images per batch when the features are computed.

    Returns:
        `accuracy`, the mean over the episodes in [0, 1], `interval`, half the width of its 95 % confidence interval
        (Student's t; `None` for one episode), `episodes` (the accuracy of each), and the settings.

    Raises:
        `DataError`, `StageError`: the set or the model cannot be loaded, or there are too few images.
    """
    # not to the standard output, which may be JSON for another program
    screen = Screen(sys.stderr)
    screen.say(f"Few-shot test of {folder} on {source}: loading")
    model, pixels = load_for_evaluation(folder)
    config, second = _splits(source, pixels, train_split, val_split, partial)
    train, validation = load_images(config), None if second is None else load_images(second)
    drawn = list(draw_episodes(train, validation, ways, shots, episodes, seed))
    model = model.to(torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu").eval()

    pool = train if validation is None else validation
    needed = ((train, [each.train for each in drawn]), (pool, [each.validation for each in drawn]))
    sets = ((ImageDataset(images, config, False), indices) for images, indices in needed)
    learnt, tested = (classifier_inputs(model, dataset, indices, batch_size, screen) for dataset, indices in sets)
    how = HEADS[stage_class(type(model)).few_shot_head]
    accuracies = [
        _accuracy(episode, learnt, tested, ways, how, seed + number)
        for number, episode in enumerate(screen.track("episodes", drawn, len(drawn)))
    ]
    return {
        "accuracy": float(np.mean(accuracies)),
        "interval": interval_95(accuracies),
        "ways": ways,
        "shots": shots,
        "seed": seed,
        "head": asdict(how),
        "episodes": accuracies,
    }


def _accuracy(
    episode: Episode,
    learnt: Mapping[int, torch.Tensor],
    tested: Mapping[int, torch.Tensor],
    ways: int,
    how: HeadTraining,
    seed: int,
) -> float:
    """Train a head on the features of an episode, and test it on the others."""
    features, labels = _gather(learnt, episode.train), torch.from_numpy(episode.own_labels(episode.train))
    predicted = train_head(features, labels, ways, how, seed)(_gather(tested, episode.validation)).argmax(dim=-1)
    return float((predicted.numpy() == episode.own_labels(episode.validation)).mean())


def _splits(
    source: str, pixels: dict[str, Any], train_split: str | None, val_split: str | None, partial: bool
) -> tuple[DataConfig, DataConfig | None]:
    """The set to learn from and the one to test on; `None`: the same."""
    own = splits_of(source) or [None]
    first, last = train_split or own[0], val_split or own[-1]
    train = data_config(source, pixels, first, partial)
    is_one = source.startswith(IMAGEFOLDER_PREFIX) or first == last
    return train, None if is_one else data_config(source, pixels, last, partial)


@torch.no_grad()
def classifier_inputs(
    model: PreTrainedModel,
    dataset: ImageDataset,
    indices: Sequence[np.ndarray],
    batch_size: int,
    screen: Screen,
) -> dict[int, torch.Tensor]:
    """
    What the model's classifiers read of each image that an episode needs, side by side for several heads and for the
    members of an ensemble, `(width,)`, by position.
    """
    needed = np.unique(np.concatenate(indices)).tolist()
    rows: list[torch.Tensor] = []
    seen: list[torch.Tensor] = []
    classifiers = stage_class(type(model)).classifiers_of(model)
    hooks = [each.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])) for each in classifiers]
    try:
        batches = DataLoader(Subset(dataset, needed), batch_size=batch_size)
        for batch in screen.track(f"features of {len(needed):,} images", batches, len(batches)):
            pixels = batch["pixel_values"].to(model.device)
            model(pixels)
            # a NAC without pooling reads the first of its output latents; the members of an image are neighbours
            read = [states[:, 0] if states.ndim == 3 else states.reshape(len(pixels), -1) for states in seen]
            rows.extend(torch.cat(read, dim=1).float().cpu())
            seen.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return dict(zip(needed, rows, strict=True))


def _gather(features: Mapping[int, torch.Tensor], positions: Sequence[int] | np.ndarray) -> torch.Tensor:
    return torch.stack([features[int(position)] for position in positions])


def train_head(
    features: torch.Tensor, labels: torch.Tensor, ways: int, how: HeadTraining, seed: int
) -> torch.nn.Linear:
    """
    Train a new linear head on frozen features.

    Args:
        features (`torch.Tensor` of shape `(n, hidden_size)`)
        labels (`torch.Tensor` of shape `(n,)`): From 0 to `ways - 1`.
        ways (`int`)
        how (`HeadTraining`)
        seed (`int`): Seed of the head's initial weights.
    """
    head = torch.nn.Linear(features.shape[1], ways)
    torch.nn.init.trunc_normal_(head.weight, std=HEAD_STD, generator=torch.Generator().manual_seed(seed))
    torch.nn.init.zeros_(head.bias)
    decayed = [{"params": [head.weight]}, {"params": [head.bias], "weight_decay": 0.0}]
    optimizer = (
        torch.optim.AdamW(decayed, lr=how.learning_rate, weight_decay=how.weight_decay)
        if how.optimizer == "adamw"
        else torch.optim.SGD(decayed, lr=how.learning_rate, momentum=0.9, nesterov=True, weight_decay=how.weight_decay)
    )
    for step in range(how.steps):
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(how, step)
        loss = F.cross_entropy(head(features), labels, label_smoothing=LABEL_SMOOTHING)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)


def _learning_rate(how: HeadTraining, step: int) -> float:
    """Linear warm-up, then half a cosine down to `min_lr`."""
    if step < how.warmup_steps:
        return how.learning_rate * (step + 1) / how.warmup_steps
    share = (step - how.warmup_steps) / max(1, how.steps - how.warmup_steps)
    return how.min_lr + (how.learning_rate - how.min_lr) * (1 + math.cos(math.pi * share)) / 2


def interval_95(values: Sequence[float]) -> float | None:
    """Half the width of the 95 % confidence interval of a mean: `t * s / sqrt(n)`. `None` for a single value."""
    # takes a second
    from scipy.stats import t

    freedom = len(values) - 1
    if freedom < 1:
        return None
    return float(t.ppf(0.975, freedom) * np.std(values, ddof=1)) / math.sqrt(len(values))
