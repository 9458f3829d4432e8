"""Floating-point operations of a training step, counted by torch on a small batch."""

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
    backends = [
        (network, network.config._attn_implementation, network.config._experts_implementation) for network in networks
    ]
    try:
        # the counter knows only the plain paths; fused attention and grouped products compute the same
        for network in networks:
            network.set_attn_implementation("eager")
            network.config._experts_implementation = "eager"
        # evaluation mode does not change the trainer's statistics and random numbers
        trainer.model.eval()
        # in the precision of the training, which the frozen networks already have
        with FlopCounterMode(display=False) as counter, trainer.accelerator.autocast():
            trainer.compute_loss(trainer.model, batch).backward()
    finally:
        trainer.model.zero_grad(set_to_none=True)
        trainer.model.train(was_training)
        for network, attention, experts in backends:
            network.set_attn_implementation(attention)
            network.config._experts_implementation = experts
    return counter.get_total_flops() / len(batch["labels"])


def count_parameters(model: torch.nn.Module) -> int:
    """Count the parameters; each tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
