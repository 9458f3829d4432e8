"""Colors above single images."""

import numpy as np
import pytest
import torch
from PIL import Image
from testing_utils import images, nac, randomized, vmoe
from transformers import ViTConfig, ViTForImageClassification

from m2mkd.evaluation.overlay import Overlay, overlays, paint
from m2mkd.evaluation.read_in import read_in_attention
from m2mkd.evaluation.routing import patch_weights


CAPACITY = {"capacity_factor": 0.5, "capacity_multiple_of": None}


@pytest.mark.parametrize("options", [{}, CAPACITY, {"router_group_size": 5, **CAPACITY}], ids=["all", "few", "groups"])
def test_the_cells_of_a_vmoe_are_its_choices(options: dict) -> None:
    model, pixel_values = randomized(vmoe(**options), 0).eval(), images()[:1]
    found = overlays(model, pixel_values)
    weights = patch_weights(model, pixel_values)
    assert [own.name for own in found] == [f"layer {layer}" for layer in weights]
    for own, (of_layer,) in zip(found, weights.values(), strict=True):
        top, experts = of_layer.topk(model.config.num_experts_per_tok)
        taken = (top > 0).flatten().tolist()
        expected = [
            str(expert) if seen else "×" for expert, seen in zip(experts.flatten().tolist(), taken, strict=True)
        ]
        assert own.marks == expected
        assert ((own.cells[..., 3] == 0).flatten() == (top == 0).flatten().numpy()).all()
        counts = [int(part.rpartition(": ")[2]) for part in own.text.split(": ", 1)[1].split(", ")]
        assert sum(counts) == len(of_layer)


def test_a_nac_shows_the_mean_of_its_latents_first() -> None:
    model, pixel_values = randomized(nac(), 0).eval(), images()[:1]
    first, *single = overlays(model, pixel_values)
    mean = read_in_attention(model, pixel_values)[0].mean(dim=0)
    assert first.cells[..., 3].argmax() == mean.argmax() and first.cells.shape[:2] == mean.shape
    assert len(single) == 3 and not first.marks


def test_paint() -> None:
    cells = np.zeros((1, 2, 4), dtype=np.uint8)
    cells[0, 0] = (255, 0, 0, 255)
    painted = paint(Image.new("RGB", (8, 4), "white"), Overlay("", "", cells, []), side=80)
    assert painted.size == (80, 40)
    assert painted.getpixel((10, 20)) == (255, 0, 0) and painted.getpixel((70, 20)) == (255, 255, 255)
    marked = paint(Image.new("RGB", (8, 4)), Overlay("", "", cells, ["3", "×"]), side=80)
    assert np.asarray(marked)[10:30, 10:30].any() and marked.getpixel((0, 0)) == (255, 255, 255)


def test_another_model_has_none() -> None:
    config = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=8)
    assert overlays(ViTForImageClassification(config), torch.zeros(1, 3, 8, 8)) == []
