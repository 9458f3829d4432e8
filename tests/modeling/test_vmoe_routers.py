"""Routers inside our models. Their numbers are compared with google-research/vmoe's in `test_vmoe_jax_parity.py`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from testing_utils import ROUTERS, assert_close, assert_equal, gradients, images, vmoe, vmoe_config
from transformers import AutoModelForImageClassification

from m2mkd import VMoEBackbone, VMoEForImageClassification
from m2mkd.modeling.modeling_vmoe import ROUTER_DIAL
from m2mkd.modeling.vmoe_routers import VMoERouter, VMoETokenChoiceRouter, compute_capacity


# The weight of a single expert is the same for all tokens if it is normalized.
ENSEMBLE = {"num_ensemble_members": 2, "num_experts_per_tok": 1, "norm_topk_prob": False}
EVERY_ROUTER = {
    **ROUTERS,
    "groups_of_ten": {**ROUTERS["priorities"], "router_group_size": 10, "router_bias": False},
    "ensemble": ENSEMBLE,
    "ensemble_with_capacity": {**ROUTERS["priorities"], **ENSEMBLE},
}
OPTIONS = pytest.mark.parametrize("options", EVERY_ROUTER.values(), ids=EVERY_ROUTER)
SHALLOW = {"num_hidden_layers": 2, "moe_layers": [1]}
LABELS = torch.tensor([0, 3, 1, 2])
BACKENDS = ["eager", "batched_mm", "grouped_mm"]


def routers(model: VMoEForImageClassification) -> Iterator[VMoERouter]:
    return (module for module in model.modules() if isinstance(module, VMoERouter))


def result(model: VMoEForImageClassification) -> dict[str, torch.Tensor]:
    """Logits, loss and every gradient of four images."""
    torch.manual_seed(1)
    outputs = model(images(4), labels=LABELS)
    logits = {"logits": outputs.logits.detach(), "loss": outputs.loss.detach()}
    return {**logits, **gradients(model, outputs.loss)}


@OPTIONS
class TestEveryRouter:
    def test_a_folder_gives_the_same_model_back(self, options: dict, tmp_path: Path) -> None:
        model = vmoe(**options)
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_equal(loaded.state_dict(), model.state_dict())
        assert torch.equal(loaded(images(4)).logits, model(images(4)).logits)

    def test_every_parameter_of_a_new_model_is_initialised(self, options: dict) -> None:
        state = VMoEForImageClassification(vmoe_config(**options)).state_dict()
        for name, value in state.items():
            assert value.isfinite().all() and value.abs().max() < 2, name

    def test_it_trains_its_router(self, options: dict) -> None:
        after = result(vmoe(**options).train())
        names = [name for name in after if ".router." in name and not name.endswith("bias")]
        assert names and all(after[name].abs().max() > 0 for name in names)

    @pytest.mark.slow
    def test_compiled_it_gives_the_same_numbers(self, options: dict) -> None:
        torch._dynamo.reset()
        model = vmoe(**options, **SHALLOW)
        expected = result(model)
        outputs = torch.compile(model, fullgraph=True)(images(4), labels=LABELS)
        ours = {"logits": outputs.logits.detach(), "loss": outputs.loss.detach(), **gradients(model, outputs.loss)}
        assert_close(ours, expected, atol=2e-5)

    @pytest.mark.parametrize("use_reentrant", [True, False])
    def test_activation_checkpointing_gives_the_same_gradients(self, options: dict, use_reentrant: bool) -> None:
        model = vmoe(**options, router_noise_std=2.0).train()
        expected = result(model)
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
        assert_close(result(model), expected, atol=1e-5)

    def test_under_autocast_it_stays_close(self, options: dict) -> None:
        model = vmoe(**options)
        expected = model(images(4)).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model(images(4), labels=LABELS)
        outputs.loss.backward()
        # a choice may change by a rounding, but not many
        assert (outputs.logits.float() - expected).norm() / expected.norm() < 0.2

    def test_in_bfloat16_it_computes_and_returns_that(self, options: dict) -> None:
        outputs = vmoe(**options).to(torch.bfloat16)(images(4).to(torch.bfloat16))
        assert outputs.logits.dtype == torch.bfloat16 and outputs.logits.isfinite().all()

    def test_the_exported_program_computes_what_the_model_does(self, options: dict) -> None:
        model = vmoe(**options, **SHALLOW)
        program = torch.export.export(model, (), {"pixel_values": images(4)})
        called = [node.target for node in program.graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
        assert called and {target.namespace for target in called} == {"aten"}
        others = images(4, seed=1)
        torch.testing.assert_close(program.module()(pixel_values=others).logits, model(others).logits)

    def test_onnx_computes_what_the_model_does(self, options: dict, tmp_path: Path) -> None:
        pytest.importorskip("onnx")
        onnxruntime = pytest.importorskip("onnxruntime")
        model = vmoe(**options, **SHALLOW)
        torch.onnx.export(model, (images(4),), str(tmp_path / "model.onnx"), dynamo=False)
        session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
        others = images(4, seed=1)
        logits, *_ = session.run(None, {session.get_inputs()[0].name: others.numpy()})
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(logits), model(others).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["priorities", "expert_choice", "soft", "ensemble_with_capacity"])
def test_it_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    model = vmoe(**EVERY_ROUTER[name], **SHALLOW)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images(4)).logits, model(images(4)).logits, atol=1e-6, rtol=1e-5)


class TestBackends:
    @pytest.mark.parametrize("backend", BACKENDS[1:])
    @pytest.mark.parametrize("options", ROUTERS.values(), ids=ROUTERS)
    def test_outputs_and_gradients_are_those_of_the_dense_product(self, options: dict, backend: str) -> None:
        model = vmoe(**options)
        assert model.config._experts_implementation == "eager"
        expected = result(model)
        model.set_experts_implementation(backend)
        assert_close(result(model), expected, atol=2e-5)


class TestGroups:
    @pytest.mark.parametrize("options", [*ROUTERS.values(), EVERY_ROUTER["ensemble_with_capacity"]], ids=str)
    def test_without_a_size_an_image_does_not_depend_on_the_others(self, options: dict) -> None:
        model = vmoe(**options)
        together, alone = model(images(4)).logits, [model(image[None]).logits[0] for image in images(4)]
        torch.testing.assert_close(together, torch.stack(alone))

    def test_a_group_may_hold_more_than_one_image(self) -> None:
        model = vmoe(**ROUTERS["capacity"])
        alone = model(images(4)).logits
        model.set_router(router_group_size=10)
        pairs = model(images(4)).logits
        assert not torch.allclose(pairs, alone)
        torch.testing.assert_close(pairs[2:], model(images(4)[2:]).logits)

    def test_tokens_that_do_not_fill_their_groups_are_refused(self) -> None:
        model = vmoe(capacity_factor=1.0, router_group_size=10)
        with pytest.raises(ValueError, match="`router_group_size` is 10, but the batch has 15 tokens.*set_router"):
            model(images(3))

    def test_without_a_limit_groups_only_change_the_losses(self) -> None:
        options = {"router_importance_loss_coef": 1.0}
        whole, by_image = vmoe(**options)(images(4)), vmoe(**options, router_group_size=5)(images(4))
        torch.testing.assert_close(whole.logits, by_image.logits)
        assert by_image.importance_loss > whole.importance_loss


class TestCapacity:
    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("normalized", [True, False])
    def test_with_room_for_all_it_is_the_router_without_a_limit(self, backend: str, normalized: bool) -> None:
        unlimited = vmoe(norm_topk_prob=normalized)
        unlimited.set_experts_implementation(backend)
        roomy = vmoe(norm_topk_prob=normalized, capacity_factor=4.0)
        assert_close(result(roomy), result(unlimited), atol=2e-5)
        assert roomy(images()).dropped == 0

    def test_what_is_dropped_has_no_output(self) -> None:
        model = vmoe(expert_capacity=1, num_experts_per_tok=1)
        mlp, hidden_states = model.vmoe.layers[1].mlp, torch.randn(3, 5, 16)
        masks = []
        mlp.dropped_mask.register_forward_hook(lambda _module, _inputs, mask: masks.append(mask))
        outputs = mlp(hidden_states)
        (mask,) = masks
        assert mask.shape == (3, 5, 1) and 0 < mask.sum() < 15
        assert torch.equal(outputs.abs().sum(-1) == 0, mask[..., 0])

    def test_the_fraction_of_dropped_choices_is_returned(self) -> None:
        model = vmoe(**ROUTERS["capacity"])
        kept = []
        for router in routers(model):
            router.register_forward_hook(
                lambda router, _inputs, choice: kept.append(router.positions(choice[3], choice[1]) < 2)
            )
        dropped = model(images(4)).dropped
        assert dropped > 0
        torch.testing.assert_close(dropped, 1 - torch.stack(kept).float().mean())

    def test_without_a_limit_it_is_not(self) -> None:
        assert vmoe()(images()).dropped is None and vmoe(**ROUTERS["soft"])(images()).dropped is None

    def test_first_choices_come_before_second_ones_and_early_tokens_before_late_ones(self) -> None:
        router = VMoETokenChoiceRouter(vmoe_config(capacity_factor=1.0))
        index = torch.tensor([[[0, 1], [1, 0], [0, 1]]])
        assert router.positions(index, torch.zeros(1, 3, 4)).tolist() == [[[0, 1], [0, 2], [1, 2]]]

    def test_with_priorities_the_largest_weights_come_first(self) -> None:
        router = VMoETokenChoiceRouter(vmoe_config(**ROUTERS["priorities"]))
        index = torch.tensor([[[0, 1], [0, 1], [0, 1]]])
        logits = torch.tensor([[[1.0, 0, 0, 0], [3.0, 0, 0, 0], [2.0, 0, 0, 0]]])
        assert router.positions(index, logits)[0, :, 0].tolist() == [2, 0, 1]

    def test_of_equal_experts_the_first_is_chosen(self) -> None:
        router = VMoETokenChoiceRouter(vmoe_config())
        assert router.choose(torch.zeros(7, 4))[1].tolist() == [[0, 1]] * 7

    def test_no_room_at_all_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`capacity_factor` 0.1 leaves each of 4 experts no room for 10"):
            compute_capacity(10, 4, 0.1, "round", None)


class TestExpertChoice:
    def test_tokens_that_no_expert_takes_are_counted_and_get_nothing(self) -> None:
        model = vmoe(router_type="expert_choice", expert_capacity=1)
        mlp, hidden_states = model.vmoe.layers[1].mlp, torch.randn(3, 5, 16)
        masks = []
        mlp.dropped_mask.register_forward_hook(lambda _module, _inputs, mask: masks.append(mask))
        outputs = mlp(hidden_states)
        assert masks[0].shape == (3, 5) and 0 < masks[0].sum() < 15
        assert torch.equal(outputs.abs().sum(-1) == 0, masks[0])
        assert 0 < model(images()).dropped < 1

    def test_more_room_than_tokens_is_refused(self) -> None:
        model = vmoe(router_type="expert_choice", capacity_factor=2.0)
        with pytest.raises(ValueError, match="would take 4 tokens.*group has only 3.*`capacity_factor` 2.0"):
            model.vmoe.layers[1].mlp(torch.randn(2, 3, 16))


class TestEnsembles:
    def test_it_returns_the_members_and_their_mean(self) -> None:
        outputs = vmoe(**EVERY_ROUTER["ensemble"])(images(4), output_hidden_states=True)
        assert outputs.member_logits.shape == (4, 2, 5) and outputs.logits.shape == (4, 5)
        torch.testing.assert_close(outputs.logits.exp(), outputs.member_logits.softmax(-1).mean(1))
        assert [len(states) for states in outputs.hidden_states] == [4, 4, 8, 8, 8]

    def test_each_member_has_its_own_experts(self) -> None:
        model = vmoe(**EVERY_ROUTER["ensemble"])
        after = gradients(model, model(images(4)).member_logits[:, 0].sum())
        for layer in (1, 3):
            experts = after[f"vmoe.layers.{layer}.mlp.experts.up_proj"]
            assert experts[:2].abs().max() > 0 and experts[2:].abs().max() == 0

    def test_a_backbone_of_one_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`num_ensemble_members` is 2.*Use `VMoEModel`"):
            VMoEBackbone(vmoe_config(num_ensemble_members=2))


class TestSetRouter:
    def test_it_changes_the_computation_and_the_config(self) -> None:
        model = vmoe()
        model.set_router(capacity_factor=0.8, capacity_multiple_of=None, num_experts_per_tok=1)
        expected = vmoe(capacity_factor=0.8, capacity_multiple_of=None, num_experts_per_tok=1)
        assert torch.equal(model(images()).logits, expected(images()).logits)
        assert (model.config.capacity_factor, model.vmoe.config.num_experts_per_tok) == (0.8, 1)
        assert model(images()).dropped > 0

    def test_a_limit_can_be_taken_away_again(self) -> None:
        model = vmoe(**ROUTERS["priorities"])
        model.set_router(capacity_factor=None, batch_prioritized_routing=False)
        assert torch.equal(model(images()).logits, vmoe()(images()).logits)

    def test_a_compiled_model_follows(self) -> None:
        torch._dynamo.reset()
        model = vmoe(**ROUTERS["capacity"], **SHALLOW)
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        before = compiled(images()).logits
        model.set_router(num_experts_per_tok=1)
        after = compiled(images()).logits
        assert not torch.allclose(after, before)
        torch.testing.assert_close(after, model(images()).logits)

    def test_the_same_options_can_be_given_when_a_folder_is_loaded(self, tmp_path: Path) -> None:
        model = vmoe()
        model.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, expert_capacity=1, num_experts_per_tok=1)
        model.set_router(expert_capacity=1, num_experts_per_tok=1)
        assert torch.equal(loaded(images()).logits, model(images()).logits)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
            ({"num_experts_per_tok": "two"}, "num_experts_per_tok"),
            ({"capacity_factor": 0}, "`capacity_factor` must be positive"),
            ({"capacity_factor": None}, "batch_prioritized_routing"),
            ({"num_experts": 2}, r"cannot change \['num_experts'\]; it changes capacity_factor"),
        ],
        ids=str,
    )
    def test_a_bad_value_is_refused_and_changes_nothing(self, options: dict, message: str) -> None:
        model = vmoe(**ROUTERS["priorities"])
        before = model.config.to_dict()
        with pytest.raises((ValueError, StrictDataclassError), match=message):
            model.set_router(**options)
        assert model.config.to_dict() == before

    def test_nothing_on_the_dial_changes_a_parameter(self) -> None:
        shapes = {name: value.shape for name, value in vmoe().state_dict().items()}
        model = vmoe(capacity_factor=2.0, num_experts_per_tok=1, batch_prioritized_routing=True, router_group_size=5)
        assert {name: value.shape for name, value in model.state_dict().items()} == shapes
        assert set(ROUTER_DIAL) <= set(model.config.to_dict())


class TestHeads:
    @pytest.mark.parametrize("pooling", ["token", "first", "gap", "map"])
    def test_only_a_class_token_is_a_token_of_its_own(self, pooling: str) -> None:
        model = vmoe(classifier_pooling=pooling, representation_size=6)
        outputs = model(images(), output_hidden_states=True)
        assert outputs.hidden_states[0].shape[1] == (5 if pooling == "token" else 4)
        assert ("vmoe.embeddings.cls_token" in model.state_dict()) == (pooling == "token")
        assert model.classifier.in_features == 6 and outputs.logits.shape == (3, 5)

    @pytest.mark.parametrize("kind", ["learned", "sincos2d"])
    @pytest.mark.parametrize("pooling", ["token", "gap"])
    def test_images_of_another_size(self, kind: str, pooling: str) -> None:
        model = vmoe(position_embedding_type=kind, classifier_pooling=pooling)
        same = model(images(), interpolate_pos_encoding=True).logits
        assert torch.equal(same, model(images()).logits)
        larger = model(images(size=16), interpolate_pos_encoding=True, output_hidden_states=True)
        assert larger.hidden_states[0].shape[1] == 16 + (pooling == "token")

    def test_fixed_positions_are_no_parameter_and_the_class_token_has_none(self) -> None:
        model = vmoe(position_embedding_type="sincos2d")
        assert "vmoe.embeddings.position_embeddings" not in model.state_dict()
        assert model.vmoe.embeddings.interpolate_pos_encoding(8, 8)[0, 0].abs().max() == 0

    def test_a_backbone_without_a_class_token_returns_every_patch(self) -> None:
        backbone = VMoEBackbone(vmoe_config(classifier_pooling="gap"))
        assert [tuple(feature.shape) for feature in backbone(images()).feature_maps] == [(3, 16, 2, 2)]
