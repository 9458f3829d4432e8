"""Weights that processes share by shards: FSDP2 of torch, ZeRO of DeepSpeed."""

import copy
import re

import torch
from accelerate.utils import parse_flag_from_env
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize
from transformers import Trainer

from m2mkd.errors import StageError


def check_sharding(trainer: Trainer) -> None:
    """
    Raise `StageError` if a trainer does not shard although it was launched to, or cannot clip the gradient of each of
    its pairs by itself.
    """
    args = trainer.args
    for name, is_enabled in (("FSDP", trainer.is_fsdp_enabled), ("DEEPSPEED", trainer.is_deepspeed_enabled)):
        if parse_flag_from_env(f"ACCELERATE_USE_{name}") and not is_enabled:
            raise StageError(
                f"{name} was asked for, but accelerate shards only on GPUs, not on {args.device.type}. Use DDP."
            )
    if trainer.is_fsdp_enabled and not trainer.accelerator.is_fsdp2:
        raise StageError("FSDP is of version 1, which merges the weights of different pairs. Set `fsdp_version: 2`.")
    if trainer.is_deepspeed_enabled and len(args.pair_indices) > 1 and args.max_grad_norm > 0:
        raise StageError(
            f"DeepSpeed clips the gradients of the pairs {args.pair_indices} by one common norm, but each pair has "
            "its own. Train one pair at a time (`pairs: [0]`; in a run, --phase pairs/0), or use FSDP2."
        )


class _AsVector(nn.Module):
    """Keeps a scalar parameter as a vector of one element: FSDP2 refuses scalars."""

    def forward(self, vector: torch.Tensor) -> torch.Tensor:
        return vector.reshape(())

    def right_inverse(self, scalar: torch.Tensor) -> torch.Tensor:
        return scalar.reshape(1)


def copy_to_shard(whole: nn.Module, device: torch.device) -> nn.Module:
    """Copy a model to a device, in a form that FSDP2 can shard."""
    copied = copy.deepcopy(whole).to(device)
    for module in list(copied.modules()):
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim == 0:
                parametrize.register_parametrization(module, name, _AsVector())
    return copied


@torch.no_grad()
def copy_whole(sharded: nn.Module, whole: nn.Module) -> None:
    """
    Copy the weights of a model from [`copy_to_shard`] back, tensor by tensor. All processes of the shards call this
    together.
    """
    own = whole.state_dict()
    for name, tensor in sharded.state_dict(keep_vars=True).items():
        name = re.sub(r"parametrizations\.(\w+)\.original$", r"\1", name)
        own[name].copy_(whole_tensor(tensor).reshape(own[name].shape))


def whole_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor of which a process may hold a shard. All processes of the shards call this together."""
    if isinstance(tensor, DTensor):
        return tensor.full_tensor()
    if hasattr(tensor, "_hp_mapping") or hasattr(tensor, "ds_id"):
        return _of_deepspeed(tensor)
    return tensor


def _of_deepspeed(tensor: nn.Parameter) -> torch.Tensor:
    from deepspeed.runtime.zero import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if tensor.requires_grad:
        # the optimizer's, where those of the passes are of half precision
        return safe_get_full_fp32_param(tensor)
    with GatheredParameters([tensor]):
        return tensor.clone()
