"""Floating-point operations of a training step, counted by torch on a small batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from m2mkd.trainer.m2mkd_trainer import M2MKDTrainer


def training_flops_per_image(trainer: M2MKDTrainer, networks: list[PreTrainedModel]) -> float:
    """
    Count the FLOPs per image of the trainer's forward and backward pass: the frozen prefix, the teacher, the student
    and the suffix. Multiplications and additions count separately; element-wise operations are left out, as usual.

    Args:
        trainer (`M2MKDTrainer`)
        networks (`list[PreTrainedModel]`): Student, teacher and meta model, as far as the trainer uses them.
    """
    samples = list(islice(iter(trainer.train_dataset), 2))
    batch = trainer.data_collator((samples * 2)[:2])
    batch = {name: value.to(trainer.args.device) for name, value in batch.items()}
    was_training = trainer.model.training
    try:
        # evaluation mode does not change the trainer's statistics and random numbers
        trainer.model.eval()
        # in the precision of the training, which the frozen networks already have
        with _countable(networks), FlopCounterMode(display=False) as counter, trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model, batch).backward()
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train(was_training)
    return counter.get_total_flops() / len(next(iter(batch.values())))


@torch.no_grad()
def forward_flops_per_image(network: PreTrainedModel, pixel_values: torch.Tensor) -> float:
    """Count the FLOPs per image of a pass without gradient, as above."""
    with _countable([network]), FlopCounterMode(display=False) as counter:
        network.eval()(pixel_values)
    return counter.get_total_flops() / len(pixel_values)


@contextmanager
def _countable(networks: list[PreTrainedModel]) -> Iterator[None]:
    """Use the plain paths, which the counter knows; fused attention and grouped products compute the same."""
    backends = [
        (network, network.config._attn_implementation, network.config._experts_implementation) for network in networks
    ]
    try:
        for network in networks:
            network.set_attn_implementation("eager")
            network.config._experts_implementation = "eager"
        yield
    finally:
        for network, attention, experts in backends:
            network.set_attn_implementation(attention)
            network.config._experts_implementation = experts


def count_parameters(model: torch.nn.Module) -> int:
    """Count the parameters; each tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
