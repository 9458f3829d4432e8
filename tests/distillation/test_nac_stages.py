"""A NAC as a chain of stages."""

import pytest
import torch

from m2mkd import NACConfig, NACForImageClassification, split_into_stages
from m2mkd.distillation.nac_stages import NACDistilledStage
from m2mkd.distillation.split import count_layers
from m2mkd.errors import StageError


VARIANTS = [
    {},
    {"pooling": "first"},
    {"latent_head_size": 7},
    {"share_codes_between_layers": False},
    {"use_latent_seeder": False},
    {"input_to_mediator": "first"},
    {"input_to_output": False},
    {"mediators_start_as_inputs": True, "num_mediator_latents": 8},
]


def circuit(**fields: object) -> NACForImageClassification:
    torch.manual_seed(0)
    return NACForImageClassification(NACConfig.from_preset("tiny", num_labels=10, **fields)).eval()


@pytest.mark.parametrize("depths", [[1, 1, 1, 1], [2, 2], [1, 2, 1], [4]])
@pytest.mark.parametrize("fields", VARIANTS, ids=str)
@torch.no_grad()
def test_running_the_stages_gives_the_logits(fields: dict, depths: list[int]) -> None:
    model = circuit(**fields)
    pixel_values = hidden_states = torch.randn(2, 3, 32, 32)
    stages = split_into_stages(model, depths)
    for stage in stages:
        hidden_states = stage(hidden_states)
    assert torch.equal(hidden_states, model(pixel_values).logits)


@pytest.mark.parametrize("depths", [[1, 1, 1, 1], [2, 2], [4]])
def test_the_state_dicts_of_the_stages_are_the_models(depths: list[int]) -> None:
    model = circuit()
    stages = split_into_stages(model, depths)
    names = [name for stage in stages for name in stage.state_dict()]
    assert sorted(names) == sorted(model.state_dict())
    for stage in stages:
        for name, tensor in stage.state_dict().items():
            assert tensor.data_ptr() == model.get_parameter(name).data_ptr()


@pytest.mark.parametrize("fields", [{}, {"pooling": "first"}, {"latent_head_size": 7}], ids=str)
def test_what_is_distilled_is_what_the_papers_students_hold(fields: dict) -> None:
    model = circuit(**fields)
    stages = split_into_stages(model, [1, 1, 1, 1])
    names = [name for stage in stages for name in stage.distilled().state_dict()]
    left_out = {name for name in model.state_dict() if "latents." in name or "seeder" in name or "kernel" in name}
    assert set(names) == set(model.state_dict()) - left_out
    assert all(isinstance(stage.distilled(), NACDistilledStage) for stage in stages)


def test_a_whole_circuit_is_distilled_as_it_is() -> None:
    model = circuit(signature_repulsion_coef=0.1)
    (stage,) = split_into_stages(model, [4])
    assert stage.distilled() is stage
    with stage.auxiliary_losses() as losses:
        assert losses().keys() == {"aux_loss", "signature_repulsion_loss"}
    for part in split_into_stages(model, [2, 2]):
        with part.auxiliary_losses() as losses:
            assert losses() == {}


def test_depths_count_read_in_rounds_and_read_out() -> None:
    model = circuit()
    assert count_layers(model) == model.config.num_hidden_layers + 2
    with pytest.raises(StageError, match=r"add up to 2 layers, but NACForImageClassification has 4"):
        split_into_stages(model, [1, 1])


def test_shared_propagators_stay_in_one_stage() -> None:
    model = circuit(share_propagators=True)
    with pytest.raises(StageError, match="share_propagators"):
        split_into_stages(model, [1, 1, 1, 1])
    stages = split_into_stages(model, [1, 2, 1])
    pixel_values = hidden_states = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for stage in stages:
            hidden_states = stage(hidden_states)
        assert torch.equal(hidden_states, model(pixel_values).logits)
