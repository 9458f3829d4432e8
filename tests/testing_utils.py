"""Networks of a few hundred parameters and the small data that the tests share."""

import json
import os
import re
import shlex
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from torch.multiprocessing import start_processes
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification

from m2mkd import (
    M2MKDConfig,
    M2MKDTrainer,
    NACConfig,
    NACForImageClassification,
    VMoEConfig,
    VMoEForImageClassification,
)


NUM_LABELS = 5
IMAGE_SIZE = 8  # four patches of 4x4 and the class token


# Routers beside the default, with little room, by a name for the test.
ROUTERS = {
    "capacity": {"capacity_factor": 0.8, "capacity_multiple_of": None},
    "priorities": {"capacity_factor": 0.8, "capacity_multiple_of": None, "batch_prioritized_routing": True},
    "expert_choice": {"router_type": "expert_choice", "capacity_factor": 1.6, "capacity_multiple_of": None},
    "soft": {"router_type": "soft", "num_slots": 2},
}


def vmoe_config(**overrides: Any) -> VMoEConfig:
    """Four layers (two of them sparse), 4 experts, top-2, 16 wide."""
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 24,
        "num_experts": 4,
        "moe_layers": [1, 3],
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "num_labels": NUM_LABELS,
    }
    return VMoEConfig(**{**sizes, **overrides})


def vit_config(**overrides: Any) -> ViTConfig:
    """Three layers, 12 wide."""
    sizes = {
        "hidden_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 20,
        "image_size": IMAGE_SIZE,
        "patch_size": 4,
        "num_labels": NUM_LABELS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return ViTConfig(**{**sizes, **overrides})


def vmoe(seed: int = 0, **overrides: Any) -> VMoEForImageClassification:
    return randomized(VMoEForImageClassification(vmoe_config(**overrides)), seed)


def vit(seed: int = 0, **overrides: Any) -> ViTForImageClassification:
    return randomized(ViTForImageClassification(vit_config(**overrides)), seed)


def nac(seed: int = 0, **overrides: Any) -> NACForImageClassification:
    """Read-in, two rounds of messages, read-out; 8 wide."""
    sizes = {
        "hidden_size": 8,
        "code_size": 6,
        "signature_size": 6,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "tokenizer_depths": [1],
        "tokenizer_hidden_sizes": [4],
        "tokenizer_layer_scale_init_value": 0.5,
        "position_embedding_size": 4,
        "num_input_latents": 3,
        "num_mediator_latents": 5,
        "num_output_latents": 2,
        "image_size": IMAGE_SIZE,
        "num_labels": NUM_LABELS,
    }
    torch.manual_seed(seed)
    return NACForImageClassification(NACConfig(**{**sizes, **overrides}))


def randomized(model: nn.Module, seed: int, std: float = 0.3) -> nn.Module:
    """Every weight, biases included, drawn large enough that each one matters to the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = ("norm" in name and name.endswith("weight")) or name.endswith("bandwidth")
            mean = 1.0 if is_scale else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)
    return model.eval()


def images(count: int = 3, seed: int = 0, size: int = IMAGE_SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


class NoiseImages(Dataset):
    """Noise with labels; `soft=True` gives distributions in the place of class indices."""

    def __init__(self, count: int = 16, seed: int = 0, soft: bool = False):
        generator = torch.Generator().manual_seed(seed + 1000)
        self.pixel_values = images(count, seed)
        self.labels = torch.randint(NUM_LABELS, (count,), generator=generator)
        if soft:
            self.labels = torch.randn(count, NUM_LABELS, generator=generator).softmax(dim=-1)

    def __len__(self) -> int:
        return len(self.pixel_values)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.pixel_values[index], "labels": self.labels[index]}


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Same names, same bits."""
    assert ours.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(ours[name], expected[name])]
    assert not different, f"differ: {different}"


def assert_close(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert ours.keys() == expected.keys()
    errors = {name: (ours[name] - expected[name]).abs().max().item() for name in expected}
    wrong = {name: error for name, error in errors.items() if not error <= atol}
    assert not wrong, f"off by more than {atol}: {wrong}"


def changed(module: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the tensors that differ from `before`."""
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradient of every parameter, zero where there is none."""
    model.zero_grad()
    loss.backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}


def run_chain(stages: Iterable[Callable[[torch.Tensor], torch.Tensor]], hidden_states: torch.Tensor) -> torch.Tensor:
    for stage in stages:
        hidden_states = stage(hidden_states)
    return hidden_states


def on_meta(build: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    """A model without memory for its weights."""
    with torch.device("meta"):
        return build()


STUDENT_DEPTHS = [1, 2, 1]  # of the four layers of vmoe()
TEACHER_DEPTHS = [1, 2, 2]


def distillation_args(output_dir: Any, **overrides: Any) -> M2MKDConfig:
    """Three pairs, four steps of SGD (its updates show the size of a gradient, AdamW's do not)."""
    settings = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "student_depths": STUDENT_DEPTHS,
        "teacher_depths": TEACHER_DEPTHS,
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 0.05,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "weight_decay": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
    }
    return M2MKDConfig(**{**settings, **overrides})


def teacher(**overrides: Any) -> ViTForImageClassification:
    return vit(seed=2, num_hidden_layers=sum(TEACHER_DEPTHS), **overrides)


def meta_model(**overrides: Any) -> ViTForImageClassification:
    return vit(seed=1, num_hidden_layers=len(STUDENT_DEPTHS), **overrides)


def distillation_trainer(
    output_dir: Any,
    model: PreTrainedModel | None = None,
    trainer_class: type[M2MKDTrainer] = M2MKDTrainer,
    **overrides: Any,
) -> M2MKDTrainer:
    """A trainer of three pairs; `train_dataset` and the other arguments of the trainer may be overridden too."""
    names = ("teacher", "meta", "train_dataset", "eval_dataset", "callbacks", "processing_class", "compute_metrics")
    own = {name: overrides.pop(name) for name in names if name in overrides}
    args = distillation_args(output_dir, **overrides)
    networks = {"teacher": teacher(), "meta": meta_model(), "train_dataset": NoiseImages()}
    return trainer_class(vmoe() if model is None else model, args, **{**networks, **own})


def code_blocks(text: str, language: str) -> list[str]:
    """The code blocks of one language in a Markdown text."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[list[str]]:
    """Every command of every `bash` block in a Markdown text, words apart and comments gone."""
    return [
        shlex.split(command, comments=True)
        for block in code_blocks(text, "bash")
        for line in block.splitlines()
        for command in line.split("&&")
        if shlex.split(command, comments=True)
    ]


def in_two_processes(work: Callable[[Path], None], folder: Path) -> list[dict[str, Any]]:
    """
    What `work` writes to `rank_0.json` and `rank_1.json` of a folder, in two processes that train together. They are
    forks of this one: by torchrun each of three would import torch and transformers again.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    start_processes(_one_of_two, (work, folder, port), nprocs=2, start_method="fork")
    return [json.loads((folder / f"rank_{rank}.json").read_text()) for rank in range(2)]


def _one_of_two(rank: int, work: Callable[[Path], None], folder: Path, port: int) -> None:
    # what torchrun sets
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()})
    # of the process before the fork
    AcceleratorState._reset_state(reset_partial_state=True)
    work(folder)
    torch.distributed.destroy_process_group()
