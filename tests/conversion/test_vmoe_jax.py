"""The parameter tree of google-research/vmoe becomes ours, with the logits of that code."""

import numpy as np
import pytest
import torch
from jax_vmoe import CHOSEN, EXPERTS, HEADS, LABELS, MLP, PATCH, SIDE, SPARSE, WIDTH, Tree, forward, tree
from testing_utils import vmoe, vmoe_config

from m2mkd import VMoEForImageClassification
from m2mkd.conversion.jax_tree import POSITIONS, converted_tree
from m2mkd.conversion.vmoe_jax import VMOE_JAX_TABLE, model_section, vmoe_jax_config
from m2mkd.errors import ConversionError


def tensors(arrays: Tree) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def converted(arrays: Tree, **arguments) -> VMoEForImageClassification:
    named = tensors(arrays)
    content = {"num_selected_experts": CHOSEN, **arguments}
    model = VMoEForImageClassification(vmoe_jax_config(named, model_section(content)))
    model.load_state_dict(converted_tree(named, VMOE_JAX_TABLE), strict=True)
    return model.eval()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_the_logits_are_those_of_the_code(implementation: str) -> None:
    images = np.random.default_rng(1).normal(size=(3, SIDE * PATCH, SIDE * PATCH, 3))
    model = converted(tree())
    model.set_experts_implementation(implementation)
    with torch.no_grad():
        ours = model(torch.from_numpy(images).float().permute(0, 3, 1, 2)).logits.numpy()
    expected = forward(tree(), images)
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


def test_sizes_come_from_the_arrays() -> None:
    config = converted(tree(), noise_std=1.0, importance_loss_weight=0.005, load_loss_weight=0.005).config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (WIDTH, 3, HEADS)
    assert (config.intermediate_size, config.num_experts, config.num_experts_per_tok) == (MLP, EXPERTS, CHOSEN)
    assert (config.image_size, config.patch_size, config.num_labels) == ([8, 8], [4, 4], LABELS)
    assert config.moe_layers == list(SPARSE) and config.norm_topk_prob is False
    # the sum over two layers
    assert (config.router_noise_std, config.router_importance_loss_coef) == (1.0, 0.01)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cls": None, POSITIONS: np.zeros((1, 4, WIDTH))}, "`classifier` is missing"),
        ({"head/kernel": None}, "`head/kernel` is missing"),
        ({"head/kernel": np.zeros(3, "float32")}, r"`head/kernel` has shape \(3,\)"),
        ({"Encoder/encoderblock_1/SelfAttention/out/kernel": np.zeros(3, "float32")}, "wrong number of axes"),
        ({POSITIONS: np.zeros((1, 7, WIDTH))}, "6 patches do not form a square"),
        ({POSITIONS: None}, "Without .* nothing shows the image size"),
        ({"Encoder/encoderblock_0/SelfAttention/gate": np.zeros(4)}, r"do not belong to the model: .*Attention/gate"),
    ],
)
def test_what_ours_does_not_have_is_refused(change: dict, message: str) -> None:
    arrays = {name: array for name, array in {**tree(), **change}.items() if array is not None}
    with pytest.raises(ConversionError, match=message):
        converted(arrays)


def test_arguments_are_taken_or_refused() -> None:
    with pytest.raises(ConversionError, match="`num_selected_experts` is missing"):
        model_section({})
    with pytest.raises(ConversionError, match=r"not known.*encoder\.moe\.router\.capacity"):
        converted(tree(), capacity=3)


def test_without_positions_in_the_arrays_they_must_be_fixed() -> None:
    arrays = tensors(tree())
    del arrays[POSITIONS]
    for position, message in (
        ({}, r"`encoder\.position_emb\.name` is missing"),
        ({"name": "none"}, r"`encoder\.position_emb\.name` is 'none'.* must be 'sincos2d'"),
        ({"name": "sincos2d", "temperature": 100}, r"`encoder\.position_emb\.temperature` is 100.* only 10000"),
    ):
        content = {"image_size": [8, 8], "encoder": {"position_emb": position}}
        with pytest.raises(ConversionError, match=message):
            vmoe_jax_config(arrays, content)
    fixed = {"image_size": [8, 8], "encoder": {"position_emb": {"name": "sincos2d"}}}
    assert vmoe_jax_config(arrays, fixed).position_embedding_type == "sincos2d"


def test_without_noise_there_is_no_load_loss() -> None:
    model = {"encoder": {"moe": {"router": {"noise_std": 0.0, "num_selected_experts": CHOSEN}}}}
    config = vmoe_jax_config(tensors(tree()), model)
    assert (config.router_importance_loss_coef, config.router_load_loss_coef) == (len(SPARSE), 0.0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"num_classes": LABELS + 1, "encoder": {}}, "`num_classes` is 6, but the tensors show 5"),
        ({"representation_size": 7, "encoder": {}}, "`representation_size` is 7, but the tensors show None"),
        ({"classifier": "gap", "encoder": {}}, "`classifier` is 'gap', but the tensors show 'token'"),
        ({"encoder": {"num_layers": 2}}, r"`encoder\.num_layers` is 2, but the tensors show 3"),
        ({"encoder": {"moe": {"layers": [0]}}}, r"`encoder\.moe\.layers` is \[0\], but the tensors show \[1, 2\]"),
        ({"encoder": {"moe": 3}}, r"`encoder\.moe` must be a section"),
        (
            {"encoder": {"moe": {"router": {"name": "OTRouter"}}}},
            "`encoder.moe.router.name` is 'OTRouter'; it must be one",
        ),
        ({"encoder": {"moe": {"router": {"name": "SoftRouter"}}}}, "Router/mu` is missing"),
        ({"encoder": {"moe": {"router": {"dispatcher": {"factor": 1}}}}}, r"not known: .*router\.dispatcher\.factor"),
    ],
)
def test_the_configuration_must_be_of_the_same_model(model: dict, message: str) -> None:
    with pytest.raises(ConversionError, match=message):
        vmoe_jax_config(tensors(tree()), model_section({"model": model}))


class TestShares:
    """`norm_topk_prob`, which sets Google's routers apart from m2mKD's."""

    def test_they_are_of_all_experts_or_of_the_chosen(self) -> None:
        hidden_states = torch.randn(7, 16)
        for normalised in (True, False):
            router = vmoe(norm_topk_prob=normalised).vmoe.layers[1].mlp.router
            logits, _, weights, index = router(hidden_states)
            shares = logits.softmax(-1).gather(-1, index)
            expected = shares / shares.sum(-1, keepdim=True) if normalised else shares
            torch.testing.assert_close(weights, expected)

    def test_the_default_is_that_of_m2mkd(self) -> None:
        assert vmoe_config().norm_topk_prob is True
