"""The share of each expert."""

import pytest
import torch
from testing_utils import ROUTERS, NoiseImages, nac, vit, vmoe

from m2mkd.evaluation.expert_load import expert_use


def test_shares_by_layer_are_those_of_the_routers_choices() -> None:
    model, images = vmoe(), NoiseImages()
    load = expert_use(model, images, batch_size=5)["expert_load"]
    assert load.keys() == {"1", "3"}
    with torch.no_grad():
        first, _ = model(images.pixel_values, output_router_logits=True).router_logits
    chosen = first.topk(2, dim=-1).indices.flatten().bincount(minlength=4)
    assert load["1"] == pytest.approx((chosen / chosen.sum()).tolist()) and sum(load["3"]) == pytest.approx(1.0)


@pytest.mark.parametrize("model", [vit, nac, lambda: vmoe(moe_layers=[])], ids=["vit", "nac", "no sparse layer"])
def test_a_model_without_experts_has_none(model) -> None:
    assert expert_use(model(), NoiseImages(), batch_size=4) == {"expert_load": None, "dropped": None}


@pytest.mark.parametrize("options", [ROUTERS["expert_choice"], ROUTERS["soft"]], ids=["expert choice", "soft"])
def test_where_tokens_do_not_choose_all_experts_do_the_same(options: dict) -> None:
    assert expert_use(vmoe(**options), NoiseImages(8), batch_size=4)["expert_load"] == {
        "1": [0.25] * 4,
        "3": [0.25] * 4,
    }


def test_members_of_an_ensemble_share_the_choices_evenly() -> None:
    load = expert_use(vmoe(num_ensemble_members=2, num_experts_per_tok=1), NoiseImages(8), batch_size=4)["expert_load"]
    assert all(sum(fractions[:2]) == pytest.approx(0.5) for fractions in load.values())


@pytest.mark.parametrize("router", ROUTERS)
def test_what_is_dropped_is_that_of_all_images(router: str) -> None:
    model, images = vmoe(**ROUTERS[router]), NoiseImages(10)
    dropped = expert_use(model, images, batch_size=4)["dropped"]
    if router == "soft":
        assert dropped is None
    else:
        assert dropped == pytest.approx(model(images.pixel_values).dropped.item()) and 0 < dropped < 1


def test_without_a_capacity_nothing_can_be_dropped() -> None:
    assert expert_use(vmoe(), NoiseImages(8), batch_size=4)["dropped"] is None
