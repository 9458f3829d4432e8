"""Sparse upcycling: a V-MoE that starts as a dense model."""

from typing import Any

import pytest
import torch
from testing_utils import images, nac, randomized, snapshot, vit, vmoe
from transformers import (
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
    ViTForImageClassification,
)

from m2mkd import VMoEForImageClassification, split_into_stages, upcycle
from m2mkd.distillation.upcycling import (
    add_noise_to_experts,
    logit_difference,
    sparse_layers,
    upcycle_into,
)
from m2mkd.errors import StageError


SIZES = {
    "hidden_size": 12,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "num_labels": 5,
}


def deit(**overrides: Any) -> DeiTForImageClassification:
    return randomized(DeiTForImageClassification(DeiTConfig(**SIZES, intermediate_size=20, **overrides)), seed=3)


def deit_with_teacher() -> DeiTForImageClassificationWithTeacher:
    return randomized(DeiTForImageClassificationWithTeacher(DeiTConfig(**SIZES, intermediate_size=20)), seed=3)


def dinov2(**overrides: Any) -> Dinov2ForImageClassification:
    return randomized(Dinov2ForImageClassification(Dinov2Config(**SIZES, **overrides)), seed=3)


class TestTheDenseModelsLogits:
    @pytest.mark.parametrize("layers", ["every-other", "all", [0, 2]])
    @pytest.mark.parametrize("experts_per_token", [1, 2, 3])
    def test_at_the_start(self, layers: str | list[int], experts_per_token: int) -> None:
        dense = vit(layer_norm_eps=1e-3, hidden_act="gelu_pytorch_tanh", qkv_bias=False)
        model = upcycle(dense, 3, layers, num_experts_per_tok=experts_per_token)
        expected = dense(images()).logits
        assert (model(images()).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        assert model.config.moe_layers == (
            [0, 1, 2] if layers == "all" else [1] if layers == "every-other" else [0, 2]
        )
        assert model.config.num_experts == 3
        difference = logit_difference(model, dense, images())
        assert difference.largest < 1e-5 * difference.largest_logit
        assert difference.agreement == 1.0

    def test_of_a_vmoe_without_experts(self) -> None:
        dense = vmoe(moe_layers=[])
        model = upcycle(dense, 4, "last-2")
        assert model.config.moe_layers == [1, 3]
        torch.testing.assert_close(model(images()).logits, dense(images()).logits)

    def test_the_hidden_states_of_a_dinov2_with_its_layer_scales(self) -> None:
        dense = dinov2(layerscale_value=0.5)
        model = upcycle(dense, 2, "all", approximate=True)
        ours, theirs = model.vmoe(images()).last_hidden_state, dense.dinov2(images()).last_hidden_state
        torch.testing.assert_close(ours, theirs)
        # the head reads the class token's half of the weights
        expected = theirs[:, 0] @ dense.classifier.weight[:, :12].T + dense.classifier.bias
        torch.testing.assert_close(model(images()).logits, expected)

    @pytest.mark.parametrize("build", [deit, deit_with_teacher])
    def test_of_a_deit_without_its_distillation_token(self, build: Any) -> None:
        dense = build()
        model = upcycle(dense, 2, "all", approximate=True)
        stage = split_into_stages(dense, [3])[0]
        tokens = stage.embeddings(images())
        hidden_states = torch.cat([tokens[:, :1], tokens[:, 2:]], dim=1)
        for layer in stage.layers:
            hidden_states = layer(hidden_states)
        head = dense.cls_classifier if build is deit_with_teacher else dense.classifier
        torch.testing.assert_close(model(images()).logits, head(dense.deit.layernorm(hidden_states)[:, 0]))
        assert logit_difference(model, dense, images()).largest > 1e-2

    def test_not_with_the_softmax_over_all_experts_and_the_difference_is_measured(self) -> None:
        dense = vit()
        model = upcycle(dense, 4, "all", norm_topk_prob=False)
        expected = (model(images()).logits - dense(images()).logits).detach().abs().max()
        difference = logit_difference(model.train(), dense, images())
        assert difference.largest == pytest.approx(float(expected)) and difference.largest > 1e-2
        assert model.training, "measuring leaves the mode as it was"


class TestUpcycle:
    def test_it_keeps_classes_mode_and_device_and_shares_no_tensor(self) -> None:
        dense = vit(id2label=dict(enumerate("abcde")), hidden_dropout_prob=0.25).train()
        model = upcycle(dense, 2, "all", router_noise_std=1.0)
        assert model.config.id2label == dict(enumerate("abcde"))
        assert (model.config.hidden_dropout_prob, model.config.router_noise_std, model.training) == (0.25, 1.0, True)
        pointers = {parameter.data_ptr() for parameter in dense.parameters()}
        assert pointers.isdisjoint(parameter.data_ptr() for parameter in model.parameters())
        with torch.no_grad():
            model.vmoe.layers[0].mlp.experts.up_proj[0] += 1
        assert not torch.equal(*model.vmoe.layers[0].mlp.experts.up_proj), "each expert has weights of its own"

    def test_a_half_precision_model_becomes_float32(self) -> None:
        model = upcycle(vit().to(torch.bfloat16), 2)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_the_routers_are_new(self) -> None:
        routers = [upcycle(vit(), 4, "all", initializer_range=0.1).vmoe.layers[1].mlp.router for _ in range(2)]
        assert not torch.equal(routers[0].weight, routers[1].weight)
        assert 0.05 < routers[0].weight.std() < 0.15 and not routers[0].bias.any()

    def test_it_is_saved_and_loaded(self, tmp_path) -> None:
        model = upcycle(vit(), 2)
        model.save_pretrained(tmp_path)
        again = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert torch.equal(again(images()).logits, model(images()).logits)

    def test_sparse_layers_are_those_of_vmoe(self) -> None:
        assert sparse_layers("every-other", 12) == [1, 3, 5, 7, 9, 11]
        # vmoe_s32_last2
        assert sparse_layers("last-2", 8) == [5, 7]
        assert sparse_layers("all", 2) == [0, 1]
        assert sparse_layers((0, 3), 4) == [0, 3]

    def test_another_image_size(self) -> None:
        dense = vit()
        model = upcycle(dense, 2, image_size=16)
        assert model(images(size=16)).logits.shape == (3, 5)
        positions, old = model.vmoe.embeddings.position_embeddings[0], dense.vit.embeddings.position_embeddings[0]
        # corners stay
        assert torch.equal(positions[[0, 1, 4, 13, 16]], old[[0, 1, 2, 3, 4]])


class TestRefused:
    @pytest.mark.parametrize(
        ("build", "arguments", "message"),
        [
            (vit, {"layers": "last-3"}, "'last-3'; it must be one of every-other, last-2, all"),
            (vit, {"layers": []}, "at least one of the 3 layers"),
            (vit, {"layers": [0, 7]}, "different layer indices from 0 to 2"),
            (vit, {"num_experts": 2, "num_experts_per_tok": 3}, "`num_experts` is 2 and `num_experts_per_tok` is 3"),
            (vit, {"num_experts_per_token": 3}, r"\['num_experts_per_token'\] are no fields"),
            (vit, {"moe_layers": [1]}, "`layers` sets `moe_layers`"),
            (
                vit,
                {"hidden_size": 16},
                "`hidden_size` is 16 in the V-MoE and 12 in the dense model.*set the V-MoE's to 12",
            ),
            (vit, {"noise_std": -1.0}, "`noise_std` must be 0 .no noise. or a positive number, but is -1.0"),
            (nac, {}, "A nac has no layers"),
            (deit, {}, "cannot express the distillation token of a deit.*approximate=True"),
            (deit_with_teacher, {}, "the distillation token and the head of the distillation token"),
            (dinov2, {}, "the half of the head that reads the mean of the patches"),
            (lambda: dinov2(use_swiglu_ffn=True), {"approximate": True}, "a gated MLP such as SwiGLU"),
            (vmoe, {"layers": [0]}, "vmoe.layers.1.mlp.experts.down_proj: only in the dense model"),
        ],
    )
    def test_by_upcycle(self, build: Any, arguments: dict[str, Any], message: str) -> None:
        with pytest.raises(StageError, match=message):
            upcycle(build(), **{"layers": "all", **arguments})

    @pytest.mark.parametrize(
        ("student", "message"),
        [
            ({"hidden_size": 16}, "`hidden_size` is 16 in the V-MoE and 12"),
            ({"num_hidden_layers": 4}, "`num_hidden_layers` is 4 in the V-MoE and 3"),
            ({"num_attention_heads": 3}, "`num_attention_heads` is 3 in the V-MoE and 2"),
            ({"intermediate_size": 24}, "`intermediate_size` is 24 in the V-MoE and 20"),
            ({"hidden_act": "relu"}, "`hidden_act` is relu in the V-MoE and gelu"),
            ({"qkv_bias": False}, "`qkv_bias` is False in the V-MoE and True"),
            ({"patch_size": 2}, r"`patch_size` is \(2, 2\) in the V-MoE and \(4, 4\)"),
            ({"image_size": 16}, r"`image_size` is \(16, 16\) .* pass `zoom_positions=True`"),
            ({"num_labels": 3}, "`num_labels` is 3 .* pass `keep_head=True`"),
            ({"stitch_size": 8, "pre_stitch_layers": [1]}, "vmoe.layers.1.pre_stitch.*: only in the V-MoE"),
        ],
    )
    def test_by_upcycle_into_which_changes_nothing(self, student: dict[str, Any], message: str) -> None:
        model = student_for_vit(**student)
        before = snapshot(model)
        with pytest.raises(StageError, match=message):
            upcycle_into(model, vit())
        assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    def test_too_few_tokens_for_the_routers(self) -> None:
        with pytest.raises(StageError, match="5 tokens .* do not form 8 clusters.*Give more images"):
            upcycle(vit(), 8, router_images=images(1))


def student_for_vit(**overrides: Any) -> VMoEForImageClassification:
    sizes = {"hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 20}
    return vmoe(**{**sizes, "moe_layers": [1], **overrides})


class TestUpcycleInto:
    def test_an_existing_student_in_place(self) -> None:
        student, dense = student_for_vit(layer_norm_eps=1e-12), vit()
        before = snapshot(student)
        upcycle_into(student, dense)
        torch.testing.assert_close(student(images()).logits, dense(images()).logits)
        router = "vmoe.layers.1.mlp.router.weight"
        assert torch.equal(student.state_dict()[router], before[router])

    @pytest.mark.parametrize("build", [vit, dinov2, vmoe])
    def test_its_own_head_is_kept(self, build: Any) -> None:
        dense: PreTrainedModel = build()
        student = upcycle(dense, 4, [1, 3] if build is vmoe else "all", approximate=True)
        head = randomized(student.classifier, seed=9).weight.clone()
        upcycle_into(student, dense, keep_head=True)
        assert torch.equal(student.classifier.weight, head)

    def test_experts_and_routers_of_a_vmoe_are_copied(self) -> None:
        source, student = vmoe(seed=1), vmoe(seed=2)
        upcycle_into(student, source)
        assert torch.equal(student(images()).logits, source(images()).logits)
        with pytest.raises(StageError, match=r"router.weight: \(3, 16\) in the V-MoE, \(4, 16\) in the dense model"):
            upcycle_into(vmoe(num_experts=3), source)


class TestOptions:
    def test_noise_in_units_of_the_weights(self) -> None:
        dense, exact = vit(), upcycle(vit(), 64, "all")
        noisy = upcycle(dense, 64, "all", noise_std=0.1)
        for name, tensor in noisy.state_dict().items():
            change = tensor - exact.state_dict()[name]
            if name.endswith((".up_proj", ".down_proj")):
                assert 0.095 < change.std() / exact.state_dict()[name].std() < 0.105
                assert change[0].abs().max() > 0 and not torch.equal(change[0], change[1])
            elif ".router." not in name:
                assert not change.any(), name
        assert 1e-3 < logit_difference(noisy, dense, images()).largest
        add_noise_to_experts(exact, 0.0)
        assert logit_difference(exact, dense, images()).largest < 1e-5

    def test_routers_from_centroids_send_each_cluster_to_an_expert_of_its_own(self) -> None:
        dense = vit(num_hidden_layers=1, qkv_bias=False)
        with torch.no_grad():
            for part in (dense.vit.embeddings.position_embeddings, dense.vit.embeddings.cls_token):
                part.zero_()
            dense.vit.layers[0].attention.o_proj.weight.zero_()
        # patches of four colours that differ clearly, and the class token
        colours = randomized(torch.nn.Linear(4, 3), seed=5, std=3.0).weight.detach().T
        kind = torch.arange(4).reshape(2, 2).repeat_interleave(4, 0).repeat_interleave(4, 1)
        pixel_values = (colours[kind].permute(2, 0, 1)[None]).repeat(6, 1, 1, 1)
        pixel_values = pixel_values + 0.01 * images(6)
        model = upcycle(dense, 5, "all", num_experts_per_tok=1, router_images=pixel_values)
        logits = model(pixel_values, output_router_logits=True).router_logits[0].detach()
        expert = logits.argmax(dim=-1).view(6, 5)
        assert len(set(expert[0].tolist())) == 5 and (expert == expert[:1]).all()
        assert logits.std(dim=-1, correction=0).mean() == pytest.approx(1.0, abs=1e-4)
        assert logit_difference(model, dense, pixel_values).agreement == 1.0

    def test_the_same_seed_gives_the_same_routers(self) -> None:
        routers = []
        for _ in range(2):
            torch.manual_seed(5)
            routers.append(upcycle(vit(), 3, "all", router_images=images(8)).vmoe.layers[2].mlp.router.weight)
        assert torch.equal(*routers)


def test_the_dense_model_is_not_changed() -> None:
    dense: ViTForImageClassification = vit()
    before = snapshot(dense)
    upcycle(dense, 2, "all", noise_std=0.5, router_images=images())
    assert all(torch.equal(before[name], tensor) for name, tensor in dense.state_dict().items())
