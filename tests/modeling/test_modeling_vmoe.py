import math

import pytest
import torch
from testing_utils import (
    IMAGE_SIZE,
    NUM_LABELS,
    NoiseImages,
    assert_close,
    assert_equal,
    changed,
    gradients,
    images,
    on_meta,
    randomized,
    snapshot,
    vit_config,
    vmoe,
    vmoe_config,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Trainer,
    TrainingArguments,
    ViTForImageClassification,
)

from m2mkd import VMoEForImageClassification, VMoEModel
from m2mkd.modeling.modeling_vmoe import VMoEDropPath, VMoERouter, balance_losses, has_balance_loss
from m2mkd.modeling.router_losses import importance_loss, load_loss


EXPERTS = ["eager", "batched_mm", "grouped_mm"]
TOKENS = 5  # of each image
LABELS = torch.tensor([0, 3, 1])


def starve_an_expert(model: VMoEForImageClassification, expert: int = 2) -> None:
    """No token is sent to one expert of each sparse layer."""
    with torch.no_grad():
        for layer in model.config.moe_layers:
            model.vmoe.layers[layer].mlp.router.bias[expert] = -1e4


def result(model: VMoEForImageClassification, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits and every gradient."""
    outputs = model(pixel_values, labels=LABELS)
    return {"logits": outputs.logits.detach(), **gradients(model, outputs.loss)}


class TestExpertsBackends:
    @pytest.mark.parametrize("starved", [False, True], ids=["all_experts_used", "one_expert_without_tokens"])
    @pytest.mark.parametrize("backend", EXPERTS[1:])
    def test_outputs_and_gradients_are_those_of_the_plain_loop(self, backend: str, starved: bool) -> None:
        model = vmoe()
        if starved:
            starve_an_expert(model)
        model.set_experts_implementation("eager")
        expected = result(model, images())
        model.set_experts_implementation(backend)
        assert_close(result(model, images()), expected, atol=2e-5)

    @pytest.mark.parametrize("sizes", [(16, 37), (18, 32), (18, 37)], ids=str)
    @pytest.mark.parametrize("dtype, atol", [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=str)
    def test_grouped_mm_takes_any_width(self, sizes: tuple[int, int], dtype: torch.dtype, atol: float) -> None:
        model = vmoe(hidden_size=sizes[0], intermediate_size=sizes[1], num_attention_heads=2).to(dtype)
        assert model.config._experts_implementation == "grouped_mm"
        after = result(model, images().to(dtype))
        model.set_experts_implementation("eager")
        assert_close(after, result(model, images().to(dtype)), atol=atol)

    @pytest.mark.parametrize("backend", EXPERTS)
    def test_an_expert_without_tokens_gets_a_zero_gradient(self, backend: str) -> None:
        model = vmoe()
        starve_an_expert(model)
        model.set_experts_implementation(backend)
        after = result(model, images())
        for layer in model.config.moe_layers:
            for name in ("up_proj", "up_proj_bias", "down_proj", "down_proj_bias"):
                gradient = after[f"vmoe.layers.{layer}.mlp.experts.{name}"]
                assert gradient[2].abs().max() == 0
                assert gradient[[0, 1, 3]].abs().amax() > 0

    @pytest.mark.parametrize("backend", EXPERTS)
    def test_under_bf16_autocast_the_logits_stay_close(self, backend: str) -> None:
        model = vmoe()
        model.set_experts_implementation(backend)
        expected = model(images()).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(images()).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).norm() / expected.norm() < 0.05

    def test_experts_are_weighed_by_the_softmax_over_the_chosen_ones(self) -> None:
        model = vmoe(num_hidden_layers=1, moe_layers=[0])
        mlp, tokens = model.vmoe.layers[0].mlp, torch.randn(6, 16)
        experts, expected = mlp.experts, torch.zeros(6, 16)
        for row, token in enumerate(tokens):
            logits = (mlp.router.weight @ token + mlp.router.bias).tolist()
            chosen = sorted(range(4), key=lambda expert, logits=logits: -logits[expert])[:2]
            total = sum(math.exp(logits[expert]) for expert in chosen)
            for expert in chosen:
                hidden = nn.functional.gelu(experts.up_proj[expert] @ token + experts.up_proj_bias[expert])
                output = experts.down_proj[expert] @ hidden + experts.down_proj_bias[expert]
                expected[row] += math.exp(logits[expert]) / total * output.detach()
        assert torch.allclose(mlp(tokens), expected, atol=1e-5)


class TestAttentionBackends:
    def test_sdpa_gives_the_outputs_and_gradients_of_eager(self) -> None:
        model = vmoe()
        model.set_attn_implementation("eager")
        expected = result(model, images())
        model.set_attn_implementation("sdpa")
        assert_close(result(model, images()), expected, atol=2e-5)

    @torch.no_grad()
    def test_flex_attention_gives_the_outputs_of_eager(self) -> None:
        # heads of at least 16; torch has no backward of it on the CPU
        model = vmoe(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, moe_layers=[])
        model.set_attn_implementation("eager")
        expected = model(images()).logits
        model.set_attn_implementation("flex_attention")
        assert torch.allclose(model(images()).logits, expected, atol=1e-5)

    def test_sdpa_is_the_default(self) -> None:
        assert vmoe().config._attn_implementation == "sdpa"


class TestMemoryAndSpeedOptions:
    def test_activation_checkpointing_gives_the_same_gradients(self) -> None:
        model = vmoe().train()
        expected = result(model, images())
        calls = []
        model.vmoe.layers[1].mlp.router.register_forward_hook(lambda *_: calls.append(1))
        model.activation_checkpointing_enable()
        assert_close(result(model, images()), expected, atol=1e-6)
        assert len(calls) == 2, "the layer was not recomputed in the backward pass"

    def test_activation_checkpointing_draws_the_same_noise_again(self) -> None:
        model = vmoe(router_noise_std=4.0, drop_path_rate=0.5, hidden_dropout_prob=0.2).train()
        torch.manual_seed(1)
        expected = result(model, images())
        model.activation_checkpointing_enable()
        torch.manual_seed(1)
        assert_close(result(model, images()), expected, atol=1e-6)

    @pytest.mark.slow
    def test_compiled_as_one_graph_it_gives_the_same_numbers(self) -> None:
        model = vmoe(num_hidden_layers=2, moe_layers=[1])
        expected = result(model, images())
        compiled = torch.compile(model, fullgraph=True)
        outputs = compiled(images(), labels=LABELS)
        ours = {"logits": outputs.logits.detach(), **gradients(model, outputs.loss)}
        assert_close(ours, expected, atol=2e-5)

    def test_it_is_one_graph(self) -> None:
        model = vmoe()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.allclose(compiled(images()).logits, model(images()).logits, atol=1e-6)

    def test_it_loads_in_bf16(self, tmp_path) -> None:
        model = vmoe()
        model.save_pretrained(tmp_path)
        half = VMoEForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
        logits, expected = half(images()).logits, model(images()).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).norm() / expected.norm() < 0.05


class TestOutputs:
    def test_all_that_can_be_asked_for_has_its_shape(self) -> None:
        model = vmoe()
        model.set_attn_implementation("eager")
        outputs = model(images(), output_hidden_states=True, output_attentions=True, output_router_logits=True)
        assert outputs.logits.shape == (3, NUM_LABELS)
        assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, TOKENS, 16)] * 5
        assert [tuple(a.shape) for a in outputs.attentions] == [(3, 4, TOKENS, TOKENS)] * 4
        assert torch.allclose(outputs.attentions[0].sum(dim=-1), torch.ones(3, 4, TOKENS))
        assert [tuple(r.shape) for r in outputs.router_logits] == [(3 * TOKENS, 4)] * 2
        assert outputs.aux_loss is None

    def test_what_is_not_asked_for_is_not_returned(self) -> None:
        outputs = vmoe(router_importance_loss_coef=0.1)(images())
        assert set(outputs.keys()) == {"logits", "aux_loss", "importance_loss"}

    def test_the_config_can_ask_for_the_router_logits(self) -> None:
        assert len(vmoe(output_router_logits=True)(images()).router_logits) == 2

    def test_an_argument_wins_over_the_config(self) -> None:
        assert vmoe(output_router_logits=True)(images(), output_router_logits=False).router_logits is None

    def test_hidden_states_lead_to_the_logits(self) -> None:
        model = vmoe()
        outputs = model(images(), output_hidden_states=True)
        last = model.vmoe.layernorm(outputs.hidden_states[-1])
        assert torch.equal(model.classifier(last[:, 0]), outputs.logits)

    def test_a_tuple_holds_what_the_dict_holds(self) -> None:
        model = vmoe(router_importance_loss_coef=0.1)
        wanted = {"labels": LABELS, "output_hidden_states": True, "output_router_logits": True}
        outputs, values = model(images(), **wanted), model(images(), **wanted, return_dict=False)
        assert isinstance(values, tuple) and len(values) == len(outputs.to_tuple()) == 6
        for name, ours, theirs in zip(outputs.keys(), values, outputs.to_tuple(), strict=True):
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            assert all(torch.equal(a, b) for a, b in pairs), name

    def test_the_bare_model_normalises_its_last_hidden_state(self) -> None:
        model = vmoe().vmoe
        outputs = model(images(), output_hidden_states=True)
        assert torch.equal(outputs.last_hidden_state, model.layernorm(outputs.hidden_states[-1]))

    def test_the_loss_is_the_cross_entropy(self) -> None:
        outputs = vmoe()(images(), labels=LABELS)
        assert torch.allclose(outputs.loss, nn.functional.cross_entropy(outputs.logits, LABELS))


class TestPositionEmbeddings:
    def test_another_size_runs_when_interpolation_is_asked_for(self) -> None:
        model = vmoe()
        outputs = model(images(size=16), interpolate_pos_encoding=True, output_hidden_states=True)
        assert outputs.hidden_states[0].shape == (3, 17, 16)
        assert outputs.logits.isfinite().all()

    def test_an_oblong_image_is_interpolated_along_each_side(self) -> None:
        embeddings = vmoe().vmoe.embeddings
        assert embeddings.interpolate_pos_encoding(8, 20).shape == (1, 1 + 2 * 5, 16)
        assert embeddings.interpolate_pos_encoding(20, 8).shape == (1, 1 + 5 * 2, 16)

    def test_another_size_without_interpolation_is_refused_with_both_sizes(self) -> None:
        with pytest.raises(ValueError, match="16x16 pixels.*8x8.*interpolate_pos_encoding=True"):
            vmoe()(images(size=16))

    def test_at_the_same_size_interpolation_changes_nothing(self) -> None:
        model = vmoe()
        assert torch.equal(model(images(), interpolate_pos_encoding=True).logits, model(images()).logits)

    def test_it_is_the_interpolation_of_vit(self) -> None:
        ours = vmoe(image_size=12)
        theirs = ViTForImageClassification(vit_config(image_size=12, hidden_size=16, num_attention_heads=4))
        with torch.no_grad():
            theirs.vit.embeddings.position_embeddings.copy_(ours.vmoe.embeddings.position_embeddings)
        for height, width in ((20, 24), (8, 12)):
            expected = theirs.vit.embeddings.interpolate_pos_encoding(torch.zeros(1, 7, 16), height, width)
            assert torch.allclose(ours.vmoe.embeddings.interpolate_pos_encoding(height, width), expected, atol=1e-6)

    def test_an_oblong_model_keeps_its_own_grid(self) -> None:
        embeddings = vmoe(image_size=[8, 16]).vmoe.embeddings
        with torch.no_grad():
            columns = torch.arange(4.0).repeat(2)  # the same in every row
            embeddings.position_embeddings[0, 1:] = columns[:, None]
        doubled = embeddings.interpolate_pos_encoding(16, 16)[0, 1:].reshape(4, 4, 16)
        assert torch.allclose(doubled, torch.arange(4.0)[None, :, None].expand(4, 4, 16), atol=1e-5)

    def test_a_wrong_number_of_channels_is_refused(self) -> None:
        with pytest.raises(ValueError, match="1 channels.*`num_channels` is 3"):
            vmoe()(torch.zeros(1, 1, IMAGE_SIZE, IMAGE_SIZE))


class TestSaveAndLoad:
    @pytest.mark.parametrize("max_shard_size", ["5GB", "4KB"], ids=["one_file", "sharded"])
    def test_the_auto_class_loads_the_same_bits(self, tmp_path, max_shard_size: str) -> None:
        model = vmoe()
        model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
        assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "4KB")
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is VMoEForImageClassification
        assert not any(info.values()), info
        assert_equal(loaded.state_dict(), model.state_dict())
        assert torch.equal(loaded(images()).logits, model(images()).logits)

    def test_the_bare_model_loads_from_a_classifier(self, tmp_path) -> None:
        model = vmoe()
        model.save_pretrained(tmp_path)
        bare = AutoModel.from_pretrained(tmp_path)
        assert type(bare) is VMoEModel
        assert_equal(bare.state_dict(), model.vmoe.state_dict())


class TestInitialisation:
    def test_weights_are_drawn_with_the_range_of_the_config(self) -> None:
        config = vmoe_config(hidden_size=32, intermediate_size=64, initializer_range=0.05)
        state = VMoEForImageClassification(config).state_dict()
        for name, value in state.items():
            if "norm" in name:
                assert (value == (1.0 if name.endswith("weight") else 0.0)).all(), name
            elif name.endswith("bias"):
                assert (value == 0).all(), name
            else:
                low, high = (0.8, 1.2) if value.numel() > 500 else (0.3, 1.7)
                assert low * 0.05 < value.std().item() < high * 0.05, name

    def test_each_expert_is_drawn_on_its_own(self) -> None:
        experts = VMoEForImageClassification(vmoe_config()).vmoe.layers[1].mlp.experts
        assert not torch.equal(experts.up_proj[0], experts.up_proj[1])

    def test_a_model_that_was_built_without_memory_is_initialised_when_it_gets_some(self) -> None:
        model = on_meta(lambda: VMoEForImageClassification(vmoe_config()))
        assert all(parameter.is_meta for parameter in model.parameters())
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
                parameter._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert 0.01 < model.vmoe.layers[1].mlp.experts.up_proj.std() < 0.03
        assert model(images()).logits.isfinite().all()

    def test_tensors_missing_from_a_checkpoint_are_initialised(self, tmp_path) -> None:
        vmoe().vmoe.save_pretrained(tmp_path)
        model = VMoEForImageClassification.from_pretrained(tmp_path)
        assert 0.005 < model.classifier.weight.std() < 0.04
        assert (model.classifier.bias == 0).all()


class TestVMoERouter:
    def test_noise_is_drawn_in_training_only_and_in_units_of_the_expert_count(self) -> None:
        model = vmoe(router_noise_std=2.0, num_hidden_layers=1, moe_layers=[0])
        router, tokens = model.vmoe.layers[0].mlp.router, torch.randn(5000, 16)
        logits, noisy, _, _ = router(tokens)
        assert torch.equal(logits, noisy)
        logits, noisy, weights, index = router.train()(tokens)
        noise = noisy - logits
        assert abs(noise.mean()) < 0.02
        assert abs(noise.std() - 2.0 / 4) < 0.01
        assert torch.equal(index, noisy.topk(2).indices)
        assert torch.allclose(weights, noisy.topk(2).values.softmax(dim=-1))


class TestBalanceLosses:
    def test_the_auxiliary_loss_is_the_weighted_mean_over_the_layers(self) -> None:
        model = vmoe(router_noise_std=1.0, router_importance_loss_coef=0.3, router_load_loss_coef=0.2).train()
        recorded = []
        for module in model.modules():
            if isinstance(module, VMoERouter):
                module.register_forward_hook(lambda _module, _inputs, outputs: recorded.append(outputs[:2]))
        outputs = model(images(), labels=LABELS)
        importance = sum(importance_loss(clean) for clean, _ in recorded) / 2
        load = sum(load_loss(clean, noisy, 1.0 / 4, 2) for clean, noisy in recorded) / 2
        assert torch.allclose(outputs.importance_loss, importance)
        assert torch.allclose(outputs.load_loss, load)
        assert torch.allclose(outputs.aux_loss, 0.3 * importance + 0.2 * load)
        cross_entropy = nn.functional.cross_entropy(outputs.logits, LABELS)
        assert torch.allclose(outputs.loss, cross_entropy + outputs.aux_loss)

    def test_its_gradient_reaches_the_routers(self) -> None:
        model = vmoe(router_importance_loss_coef=0.3)
        after = gradients(model, model(images()).aux_loss)
        assert after["vmoe.layers.1.mlp.router.weight"].abs().sum() > 0
        assert after["classifier.weight"].abs().sum() == 0

    def test_a_load_loss_alone_is_the_whole_auxiliary_loss(self) -> None:
        config = vmoe_config(router_noise_std=1.0, router_load_loss_coef=0.5)
        clean, noisy = (torch.randn(6, 4),), (torch.randn(6, 4),)
        losses = balance_losses(clean, noisy, config)
        assert torch.allclose(losses["aux_loss"], 0.5 * load_loss(clean[0], noisy[0], 0.25, 2))

    @pytest.mark.parametrize(
        "overrides, expected",
        [
            ({}, False),
            ({"router_importance_loss_coef": 0.1}, True),
            ({"router_importance_loss_coef": 0.1, "moe_layers": []}, False),
        ],
        ids=["no_weight", "weighed", "no_experts"],
    )
    def test_has_balance_loss_tells_whether_there_is_one(self, overrides: dict, expected: bool) -> None:
        assert has_balance_loss(vmoe_config(**overrides)) is expected
        assert (vmoe(**overrides)(images()).aux_loss is not None) is expected

    def test_another_architecture_has_none(self) -> None:
        assert has_balance_loss(vit_config()) is False


class TestVMoEDropPath:
    def test_it_drops_whole_images_and_keeps_the_mean(self) -> None:
        drop_path = VMoEDropPath(0.25).train()
        output = drop_path(torch.ones(20000, 2, 3))
        rows = output.flatten(1)
        assert (rows == rows[:, :1]).all()
        assert set(rows[:, 0].tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert abs((rows[:, 0] == 0).float().mean() - 0.25) < 0.02
        assert abs(output.mean() - 1) < 0.02

    def test_it_does_nothing_in_evaluation(self) -> None:
        ones = torch.ones(4, 2, 3)
        assert VMoEDropPath(0.9).eval()(ones) is ones

    def test_the_rate_grows_linearly_to_the_last_layer(self) -> None:
        rates = [layer.drop_path.drop_prob for layer in vmoe(drop_path_rate=0.3).vmoe.layers]
        assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])

    def test_a_model_of_one_layer_drops_nothing(self) -> None:
        assert vmoe(num_hidden_layers=1, moe_layers=[], drop_path_rate=0.3).vmoe.layers[0].drop_path.drop_prob == 0


class TestAgainstViT:
    def test_without_experts_it_is_a_vit(self) -> None:
        sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}
        theirs = randomized(ViTForImageClassification(vit_config(**sizes, layer_norm_eps=1e-6)), seed=3)
        ours = VMoEForImageClassification(vmoe_config(num_hidden_layers=3, moe_layers=[])).eval()
        renamed = {name.replace("vit.", "vmoe.", 1): value for name, value in theirs.state_dict().items()}
        ours.load_state_dict(renamed, strict=True)
        expected = theirs(images(), labels=LABELS)
        outputs = ours(images(), labels=LABELS)
        assert torch.allclose(outputs.logits, expected.logits, atol=1e-6)
        theirs_gradients = gradients(theirs, expected.loss)
        renamed = {name.replace("vit.", "vmoe.", 1): value for name, value in theirs_gradients.items()}
        assert_close(gradients(ours, outputs.loss), renamed, atol=1e-6)

    @pytest.mark.parametrize("backend", EXPERTS)
    def test_with_one_expert_it_is_the_dense_mlp(self, backend: str) -> None:
        dense = vmoe(moe_layers=[])
        sparse = VMoEForImageClassification(vmoe_config(moe_layers=None, num_experts=1, num_experts_per_tok=1)).eval()
        state = sparse.state_dict()
        for name, value in dense.state_dict().items():
            for ours, theirs in (("fc1", "up_proj"), ("fc2", "down_proj")):
                name = name.replace(f"mlp.{ours}.weight", f"mlp.experts.{theirs}")
                name = name.replace(f"mlp.{ours}.bias", f"mlp.experts.{theirs}_bias")
            state[name] = value[None] if ".experts." in name else value
        sparse.load_state_dict(state, strict=True)
        sparse.set_experts_implementation(backend)
        assert torch.allclose(sparse(images()).logits, dense(images()).logits, atol=1e-5)


class TestStitchesInTheModel:
    def test_they_change_the_width_where_the_config_puts_them(self) -> None:
        model = vmoe(stitch_size=10, pre_stitch_layers=[2], post_stitch_layers=[1])
        outputs = model(images(), output_hidden_states=True)
        assert [h.shape[-1] for h in outputs.hidden_states] == [16, 16, 10, 16, 16]
        assert model.vmoe.layers[0].pre_stitch is None and model.vmoe.layers[2].post_stitch is None


class TestOrdinaryTrainer:
    def test_it_trains_every_parameter(self, tmp_path) -> None:
        model = vmoe(router_importance_loss_coef=0.1, num_experts_per_tok=4)
        before = snapshot(model)
        args = TrainingArguments(
            tmp_path, use_cpu=True, max_steps=2, per_device_train_batch_size=8, learning_rate=0.01, report_to=[],
            save_strategy="no", disable_tqdm=True, weight_decay=0.0,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=NoiseImages(), eval_dataset=NoiseImages(6, seed=1))
        losses = trainer.train()
        # a constant added to all keys does not change the attention: their bias has no gradient but round-off
        still = set(before) - changed(model, before)
        assert {name for name in still if not name.endswith("k_proj.bias")} == set()
        assert math.isfinite(losses.training_loss)
        predictions = trainer.predict(NoiseImages(6, seed=1)).predictions
        assert predictions.shape == (6, NUM_LABELS)
