"""Training throughput of a device, for plans."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageClassification, ViTConfig


# TFLOP/s of one GPU in training, if none is given: about a third of the peak of an A100 in bfloat16.
THROUGHPUT = 100.0


def measure_throughput(seconds: float = 3.0) -> float:
    """
    Measure the TFLOP/s of this machine's device in training: the embeddings and four layers of ViT-Base, forward and
    backward, in bfloat16 on an accelerator.

    Args:
        seconds (`float`): Duration of the measurement, after a first step.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = accelerator or torch.device("cpu")
    batch = 64 if accelerator else 2
    model = AutoModelForImageClassification.from_config(ViTConfig(num_hidden_layers=4)).to(device)
    pixel_values = torch.randn(batch, 3, 224, 224, device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=accelerator is not None):
            model(pixel_values).logits.sum().backward()
        if accelerator is not None:
            torch.accelerator.synchronize()

    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        step()
    model.set_attn_implementation("sdpa")
    step()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        step()
        steps += 1
    return counter.get_total_flops() * steps / (time.perf_counter() - start) / 1e12
