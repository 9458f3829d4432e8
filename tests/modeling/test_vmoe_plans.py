"""A V-MoE that two processes share gives what one process computes."""

import json
import os
from pathlib import Path

import pytest
import torch
from testing_utils import NUM_LABELS, ROUTERS, NoiseImages, in_two_processes, vmoe
from torch.distributed.tensor import DTensor
from transformers.distributed import DistributedConfig

from m2mkd import VMoEForImageClassification


# what the two processes share
ATTENTION = {"tp_size": 2}
EXPERTS = {"tp_size": 2, "ep_size": 2}
SHARDS = {"fsdp_size": 2}
SHARDS_AND_EXPERTS = {"fsdp_size": 2, "ep_size": 2}

CASES = {
    "experts": ({}, EXPERTS, "grouped_mm"),
    "experts_eager": ({}, EXPERTS, "eager"),
    **{f"experts_{name}": (options, EXPERTS, "eager") for name, options in ROUTERS.items()},
    "experts_capacity_grouped": (ROUTERS["capacity"], EXPERTS, "grouped_mm"),
    "experts_ensemble": ({"num_ensemble_members": 2, "num_experts_per_tok": 1}, EXPERTS, "grouped_mm"),
    "experts_qk_norm": ({"use_qk_norm": True}, EXPERTS, "grouped_mm"),
    "attention": ({"use_qk_norm": True, "classifier_pooling": "map"}, ATTENTION, "grouped_mm"),
    "dense": ({"moe_layers": []}, ATTENTION, None),
    "shards": ({}, SHARDS, "grouped_mm"),
    "shards_capacity": (ROUTERS["capacity"], SHARDS, "eager"),
    "shards_and_experts": ({}, SHARDS_AND_EXPERTS, "grouped_mm"),
    "shards_and_experts_priorities": (ROUTERS["priorities"], SHARDS_AND_EXPERTS, "eager"),
}
GRADIENTS = (
    "layers.0.mlp.fc1.weight",
    "layers.1.attention.q_proj.weight",
    "layers.1.attention.q_norm.weight",
    "layers.1.mlp.experts.up_proj",
    "layers.1.mlp.experts.down_proj_bias",
    "layers.3.mlp.router.weight",
)


def results(model: VMoEForImageClassification, images: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits without and with gradients, and gradients of the loss."""
    with torch.no_grad():
        logits = model(images).logits
    output = model(images, labels=labels)
    output.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.vmoe.named_parameters() if name in GRADIENTS}
    full = {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in gradients.items()}
    return {"logits": logits, "training logits": output.logits.detach(), **full}


def main(folder: Path) -> None:
    rank, report = int(os.environ["RANK"]), {}
    images, labels = NoiseImages(8).pixel_values, torch.arange(8) % NUM_LABELS
    for name, (_, parallel, experts) in CASES.items():
        model = VMoEForImageClassification.from_pretrained(
            folder / name, distributed_config=DistributedConfig(**parallel), experts_implementation=experts
        ).eval()
        # with FSDP each process has its own images
        own = slice(4 * rank, 4 * rank + 4) if "fsdp_size" in parallel else slice(None)
        report[name] = {key: value.tolist() for key, value in results(model, images[own], labels[own]).items()}
        report[name]["held"] = {
            key: (value.to_local() if isinstance(value, DTensor) else value).numel()
            for key, value in model.vmoe.named_parameters()
        }
    (folder / f"rank_{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("plans")
    for name, (options, _, _) in CASES.items():
        vmoe(**options).save_pretrained(folder / name)
    return in_two_processes(main, folder)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_give_logits_and_gradients_of_one(ranks: list[dict], name: str) -> None:
    options, parallel, _ = CASES[name]
    alone = results(vmoe(**options), NoiseImages(8).pixel_values, torch.arange(8) % NUM_LABELS)
    for rank, shared in enumerate(ranks):
        for key, expected in alone.items():
            if "fsdp_size" in parallel and "logits" in key:
                expected = expected[4 * rank : 4 * rank + 4]
            torch.testing.assert_close(torch.tensor(shared[name][key]), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name, part",
    [
        ("experts", ".mlp.experts."),
        ("experts_soft", ".mlp.experts."),
        ("attention", ".attention.q_proj."),
        ("dense", ".mlp.fc1."),
        ("shards", ""),
        ("shards_and_experts", ""),
    ],
)
def test_each_process_holds_half(ranks: list[dict], name: str, part: str) -> None:
    sizes = {key: value.numel() for key, value in vmoe(**CASES[name][0]).vmoe.named_parameters() if part in key}
    for shared in ranks:
        held = sum(size for key, size in shared[name]["held"].items() if part in key)
        assert held == pytest.approx(sum(sizes.values()) / 2, rel=0.02)
