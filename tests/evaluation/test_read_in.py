"""Where the input latents of a NAC look."""

import pytest
import torch
from testing_utils import images, nac, randomized

from m2mkd.errors import StageError
from m2mkd.evaluation.read_in import read_in_attention


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_attention_is_that_of_the_model(backend: str) -> None:
    model = randomized(nac(), 0)
    attention = model.nac.read_in.attention
    model.set_attn_implementation("eager")
    seen = {}
    attention.v_proj.register_forward_pre_hook(lambda _m, inputs: seen.update(messages=inputs[0]))
    attention.sender_layernorm.register_forward_hook(lambda _m, _i, output: seen.update(tokens=output))
    with torch.no_grad():
        model(images())
    model.set_attn_implementation(backend)
    weights = read_in_attention(model, images())
    assert weights.shape == (3, 3, 2, 2)
    torch.testing.assert_close(weights.sum(dim=(-1, -2)), torch.ones(3, 3))
    # what a latent receives is the mean of the tokens under this attention
    expected = weights.flatten(2) @ seen["tokens"]
    torch.testing.assert_close(seen["messages"].mean(dim=2), expected, atol=1e-5, rtol=1e-4)


def test_images_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(StageError, match="cannot read these images"):
        read_in_attention(nac().eval(), images(size=2))
