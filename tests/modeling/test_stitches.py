import pytest
import torch
from torch import nn

from m2mkd.modeling.stitches import StitchLayer


class TestStitchLayer:
    def test_it_is_a_layer_norm_and_a_linear(self) -> None:
        stitch, hidden_states = StitchLayer(6, 4), torch.randn(2, 3, 6) * 5 + 1
        centred = hidden_states - hidden_states.mean(dim=-1, keepdim=True)
        normalized = centred / (hidden_states.var(dim=-1, correction=0, keepdim=True) + 1e-5).sqrt()
        assert torch.allclose(stitch(hidden_states), normalized @ stitch.linear.weight.T, atol=1e-5)

    def test_without_normalisation_it_is_a_linear_alone(self) -> None:
        stitch, hidden_states = StitchLayer(6, 4, normalize=False), torch.randn(2, 3, 6)
        assert set(stitch.state_dict()) == {"linear.weight", "linear.bias"}
        assert torch.allclose(stitch(hidden_states), nn.functional.linear(hidden_states, stitch.linear.weight))

    def test_it_starts_as_in_the_official_code(self) -> None:
        stitch = StitchLayer(64, 64)
        assert 0.018 < stitch.linear.weight.std() < 0.022
        assert (stitch.linear.bias == 0).all()
        assert stitch.layernorm.eps == 1e-5

    @pytest.mark.parametrize("normalize", [True, False])
    def test_reset_parameters_draws_anew(self, normalize: bool) -> None:
        stitch = StitchLayer(6, 4, normalize)
        before = stitch.linear.weight.clone()
        stitch.reset_parameters()
        assert not torch.equal(stitch.linear.weight, before)
