import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from testing_utils import assert_equal, changed, gradients, images, on_meta, snapshot
from torch import nn
from torch.utils.data import Dataset
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments

from m2mkd import NACConfig, NACForImageClassification, NACModel
from m2mkd.modeling import modeling_nac
from m2mkd.modeling.graph_losses import block_model_graphon, block_model_loss, link_probability
from m2mkd.modeling.graph_priors import adjacency_matrix, cosine_distance, make_graph
from m2mkd.modeling.nac_layers import MIN_BANDWIDTH, LowerBound, NACModulatedLinear, NACPooling


SIZE = 32  # pixels: 16 tokens
LABELS = torch.tensor([0, 3, 1])
PRIORS: dict[str, dict[str, Any]] = {
    "barabasi_albert": {"graph_prior_kwargs": {"m": 2}},
    "planted_partition": {"graph_prior_kwargs": {"l": 4, "k": 6, "p_in": 0.9, "p_out": 0.2}},
    "ring_of_cliques": {"graph_prior_kwargs": {"num_cliques": 4, "clique_size": 6}},
    "erdos_renyi": {"graph_prior_kwargs": {"p": 0.2}},
    "watts_strogatz": {"graph_prior_kwargs": {"k": 4, "p": 0.3}},
    "grid": {"graph_prior_kwargs": {"dim": [4, 6]}},
    "balanced_tree": {"graph_prior_kwargs": {"r": 2, "h": 3}, "num_mediator_latents": 15},
    "barbell": {"graph_prior_kwargs": {"m1": 12}},
    "hypercube": {"num_mediator_latents": 16},
    "complete": {},
}
# Each of them has other tensors than the default.
FORMS: dict[str, dict[str, Any]] = {
    "first_latent": {"pooling": "first"},
    "first_latent_without_layernorm": {"pooling": "first", "head_layernorm": False},
    "pooled_heads": {"latent_head_size": 7},
    "no_seeder": {"use_latent_seeder": False},
    "no_state_noise": {"use_state_noise": False},
    "shared_propagators": {"share_propagators": True},
    "codes_by_round": {"share_codes_between_layers": False},
    "fixed_bandwidth": {"learnable_bandwidth": False, "kernel_bandwidth": 0.7},
    "fixed_gain": {"learnable_code_scale_gain": False},
    "own_layernorms": {"share_layernorm": False},
    "biases": {"qkv_bias": True},
    "no_gate": {"use_geglu": False},
    "no_positions": {"position_embedding_size": 0},
    "mediators_as_inputs": {"mediators_start_as_inputs": True, "num_mediator_latents": 8, "use_latent_seeder": False},
    "three_tokenizer_stages": {"tokenizer_depths": [1, 0, 1]},
    "no_labels": {"num_labels": 0},
}


def nac(seed: int = 0, **fields: Any) -> NACForImageClassification:
    """The tiny preset with weights that all matter to the output."""
    torch.manual_seed(seed)
    model = NACForImageClassification(NACConfig.from_preset("tiny", **{"num_labels": 5, **fields}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("layer_scale", "bandwidth", "gain")):
                parameter.uniform_(0.5, 1.2)
            elif name.endswith("bias") or "norm" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.eval()


def pixels(count: int = 3, size: int = SIZE) -> torch.Tensor:
    return images(count, size=size)


def shown_graph(model: NACForImageClassification) -> torch.Tensor:
    """The mediators that the kernel connects."""
    signatures = model.nac.mediator_latents.signatures.detach()
    return (cosine_distance(signatures, signatures) < model.config.kernel_truncation).fill_diagonal_(False)


@pytest.fixture
def no_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every later fit an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("signatures were fitted")

    monkeypatch.setattr(modeling_nac, "signatures_for", refuse)


class TestSaveAndLoad:
    @pytest.mark.parametrize("prior", PRIORS)
    def test_a_graph_is_loaded_and_never_fitted_again(
        self, tmp_path, prior: str, request: pytest.FixtureRequest
    ) -> None:
        model = nac(graph_prior=prior, **PRIORS[prior])
        model.save_pretrained(tmp_path)
        request.getfixturevalue("no_fit")
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert type(loaded) is NACForImageClassification
        assert not any(info.values()), info
        assert_equal(loaded.state_dict(), model.state_dict())
        # a copy: tensors that lie in the file are not aligned, and some products then round another way
        assert torch.equal(copy.deepcopy(loaded)(pixels()).logits, model(pixels()).logits)
        assert loaded.config.graph_prior == prior

    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_loads_the_same_bits(self, tmp_path, form: str) -> None:
        model = nac(**FORMS[form])
        model.save_pretrained(tmp_path)
        loaded, info = AutoModelForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert_equal(loaded.state_dict(), model.state_dict())
        # a copy: tensors that lie in the file are not aligned, and some products then round another way
        assert torch.equal(copy.deepcopy(loaded)(pixels()).logits, model(pixels()).logits)

    def test_shards(self, tmp_path) -> None:
        model = nac()
        model.save_pretrained(tmp_path, max_shard_size="100KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
        loaded = NACForImageClassification.from_pretrained(tmp_path)
        assert_equal(loaded.state_dict(), model.state_dict())

    def test_the_bare_model_loads_from_a_classifier(self, tmp_path) -> None:
        model = nac()
        model.save_pretrained(tmp_path)
        bare = AutoModel.from_pretrained(tmp_path)
        assert type(bare) is NACModel
        assert_equal(bare.state_dict(), model.nac.state_dict())

    @pytest.mark.parametrize("fields", [{}, {"pooling": "first"}], ids=["pooled", "first_latent"])
    def test_a_classifier_of_other_classes_starts_anew(self, tmp_path, fields: dict[str, Any]) -> None:
        model = nac(**fields)
        model.save_pretrained(tmp_path)
        loaded = NACForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
        assert loaded(pixels()).logits.shape == (3, 7)
        assert all(parameter.isfinite().all() for parameter in loaded.classifier.parameters())
        assert_equal(loaded.nac.state_dict(), model.nac.state_dict())

    def test_a_classifier_of_other_classes_is_refused_unless_told(self, tmp_path) -> None:
        nac().save_pretrained(tmp_path)
        with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
            NACForImageClassification.from_pretrained(tmp_path, num_labels=7)

    @torch.no_grad()
    def test_it_loads_in_bf16(self, tmp_path) -> None:
        model = nac()
        model.save_pretrained(tmp_path)
        half = NACForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
        logits, expected = half(pixels()).logits, model(pixels()).logits
        assert logits.dtype == torch.bfloat16
        assert (logits - expected).norm() / expected.norm() < 0.1


class TestGraphPrior:
    @pytest.mark.parametrize("prior", PRIORS)
    def test_a_new_model_shows_its_graph(self, prior: str) -> None:
        model = nac(graph_prior=prior, **PRIORS[prior])
        config = model.config
        graph = make_graph(prior, config.num_mediator_latents, config.graph_prior_kwargs, config.graph_prior_seed)
        assert torch.equal(shown_graph(model), adjacency_matrix(graph).bool())

    def test_without_one_signatures_are_random(self, no_fit: None) -> None:
        assert 0.8 < nac().nac.mediator_latents.signatures.std() < 1.2

    def test_a_classifier_is_fitted_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        fits, fit = [], modeling_nac.signatures_for
        monkeypatch.setattr(modeling_nac, "signatures_for", lambda *a, **k: fits.append(a) or fit(*a, **k))
        nac(graph_prior="complete")
        assert len(fits) == 1

    def test_the_seed_of_the_config_draws_the_graph(self) -> None:
        fields = {"graph_prior": "erdos_renyi", "graph_prior_kwargs": {"p": 0.2}}
        first, again, other = (nac(seed=i, **fields, graph_prior_seed=seed) for i, seed in enumerate((1, 1, 2)))
        signatures = [model.nac.mediator_latents.signatures for model in (first, again, other)]
        assert torch.equal(signatures[0], signatures[1])
        assert not torch.equal(shown_graph(first), shown_graph(other))

    def test_another_truncation_than_the_kernel_s_is_the_paper_s_option(self) -> None:
        fields = {"graph_prior": "ring_of_cliques", **PRIORS["ring_of_cliques"]}
        exact, wider = nac(**fields), nac(**fields, graph_prior_truncation=0.7)
        assert shown_graph(wider).sum() > shown_graph(exact).sum()
        assert (shown_graph(wider) | ~shown_graph(exact)).all()

    def test_a_model_without_memory_is_not_fitted(self, no_fit: None) -> None:
        config = NACConfig.from_preset("tiny", graph_prior="grid", **PRIORS["grid"])
        model = on_meta(lambda: NACForImageClassification(config))
        assert all(parameter.is_meta for parameter in model.parameters())

    def test_a_loaded_model_of_other_classes_keeps_its_graph(self, tmp_path, request: pytest.FixtureRequest) -> None:
        model = nac(graph_prior="grid", **PRIORS["grid"])
        model.save_pretrained(tmp_path)
        request.getfixturevalue("no_fit")
        loaded = NACForImageClassification.from_pretrained(tmp_path, num_labels=7, ignore_mismatched_sizes=True)
        assert torch.equal(shown_graph(loaded), shown_graph(model))

    def test_learnable_signatures_can_be_switched_off(self) -> None:
        latents = nac(learnable_signatures=False).nac.mediator_latents
        assert not latents.signatures.requires_grad and latents.codes.requires_grad


class TestRandomness:
    @pytest.mark.parametrize("pooling", ["gumbel", "gumbel_hard", "softmax", "first"])
    @torch.no_grad()
    def test_evaluation_draws_nothing(self, pooling: str) -> None:
        model = nac(pooling=pooling)
        before = torch.get_rng_state()
        logits = model(pixels()).logits
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.equal(model(pixels()).logits, logits)

    @torch.no_grad()
    def test_images_of_a_batch_do_not_see_each_other(self) -> None:
        model = nac()
        together = model(pixels()).logits
        alone = torch.cat([model(image[None]).logits for image in pixels()])
        assert torch.allclose(alone, together, atol=1e-5)

    @torch.no_grad()
    def test_sampling_in_evaluation_brings_seeder_and_gumbel_noise(self) -> None:
        model, calm = nac(sample_in_eval=True), nac()
        first, second = model(pixels()).logits, model(pixels()).logits
        assert not torch.allclose(first, second, atol=1e-3)
        torch.manual_seed(3)
        third = model(pixels()).logits
        torch.manual_seed(3)
        assert torch.equal(model(pixels()).logits, third)
        # neither code noise nor sampled edges: those are of training
        noise = nac(sample_in_eval=True, use_state_noise=False, pooling="softmax")
        assert torch.equal(noise(pixels()).logits, noise(pixels()).logits)
        assert not torch.allclose(calm(pixels()).logits, first, atol=1e-3)

    def test_training_draws_and_repeats_with_the_seed(self) -> None:
        model = nac().train()
        first, second = model(pixels()).logits, model(pixels()).logits
        assert not torch.allclose(first, second, atol=1e-3)
        torch.manual_seed(3)
        third = model(pixels()).logits
        torch.manual_seed(3)
        assert torch.equal(model(pixels()).logits, third)

    def test_with_all_noise_off_training_computes_what_evaluation_does(self) -> None:
        model = nac(
            code_noise_scale=0.0, use_state_noise=False, stochastic_kernel=False, drop_path_rate=0.0,
            pooling="softmax",
        )  # fmt: skip
        expected = model(pixels()).logits
        assert torch.allclose(model.train()(pixels()).logits, expected, atol=1e-5)

    @torch.no_grad()
    def test_hard_pooling_takes_one_latent(self) -> None:
        pooling = NACPooling(NACConfig.from_preset("tiny", pooling="gumbel_hard")).eval()
        states = torch.randn(5, 4, 48)
        chosen = pooling.confidence(states)[..., 0].argmax(dim=-1)
        assert torch.allclose(pooling(states), states[torch.arange(5), chosen], atol=1e-6)
        pooled = pooling.train()(states)
        distances = (states - pooled[:, None]).abs().amax(dim=-1)
        assert (distances.amin(dim=-1) < 1e-5).all()


class TestOutputs:
    def test_all_that_can_be_asked_for_has_its_shape(self) -> None:
        model = nac()
        model.set_attn_implementation("eager")
        outputs = model(pixels(), output_hidden_states=True, output_attentions=True)
        assert outputs.logits.shape == (3, 5)
        assert [tuple(h.shape) for h in outputs.hidden_states] == [(3, 8 + 24, 48)] * 3
        assert [tuple(a.shape) for a in outputs.attentions] == [(3, 3, 24, 32)] * 2
        assert [tuple(a.shape) for a in outputs.cross_attentions] == [(3, 3, 4, 32)]
        for attention in (*outputs.attentions, *outputs.cross_attentions):
            assert torch.allclose(attention.sum(dim=-1), torch.ones(attention.shape[:-1]), atol=1e-5)

    def test_attention_goes_along_the_graph_alone(self) -> None:
        model = nac(graph_prior="grid", **PRIORS["grid"])
        model.set_attn_implementation("eager")
        attention = model(pixels(), output_attentions=True).attentions[0][..., 8:]
        linked = shown_graph(model).fill_diagonal_(True)
        assert (attention[..., ~linked] == 0).all() and (attention[..., linked] > 0).all()

    @pytest.mark.parametrize(
        "fields, senders",
        [
            ({}, [32, 32, 32]),
            ({"input_to_mediator": "first"}, [32, 24, 32]),
            ({"input_to_mediator": "none"}, [24, 24, 32]),
            ({"input_to_output": False}, [32, 32, 24]),
        ],
        ids=str,
    )
    def test_who_sends_to_whom(self, fields: dict[str, Any], senders: list[int]) -> None:
        model = nac(**fields)
        model.set_attn_implementation("eager")
        outputs = model(pixels(), output_attentions=True)
        attentions = (*outputs.attentions, *outputs.cross_attentions)
        assert [attention.shape[-1] for attention in attentions] == senders

    def test_input_latents_stay_as_they_read(self) -> None:
        states = nac()(pixels(), output_hidden_states=True).hidden_states
        assert torch.equal(states[0][:, :8], states[-1][:, :8])
        assert not torch.equal(states[0][:, 8:], states[-1][:, 8:])

    def test_what_is_not_asked_for_is_not_returned(self) -> None:
        assert set(nac(signature_repulsion_coef=0.1)(pixels()).keys()) == {"logits"}

    def test_a_tuple_holds_what_the_output_holds(self) -> None:
        model = nac(signature_repulsion_coef=0.1)
        wanted = {"labels": LABELS, "output_hidden_states": True}
        outputs, values = model(pixels(), **wanted), model(pixels(), **wanted, return_dict=False)
        assert isinstance(values, tuple) and len(values) == len(outputs.to_tuple()) == 5
        for name, ours, theirs in zip(outputs.keys(), values, outputs.to_tuple(), strict=True):
            pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
            assert all(torch.equal(a, b) for a, b in pairs), name

    def test_the_bare_model_gives_the_states_that_are_pooled(self) -> None:
        model = nac()
        states = model.nac(pixels()).last_hidden_state
        assert states.shape == (3, 4, 48)
        assert torch.equal(model.classify(states), model(pixels()).logits)

    def test_without_labels_the_pooled_states_come_out(self) -> None:
        assert nac(num_labels=0)(pixels()).logits.shape == (3, 48)
        assert nac(num_labels=0, pooling="first")(pixels()).logits.shape == (3, 48)

    def test_sdpa_is_the_default(self) -> None:
        assert nac().config._attn_implementation == "sdpa"


class TestOfficialOptions:
    """Options that m2mKD's checkpoints do not use, beside plain formulas of what the official code does with them."""

    @pytest.mark.parametrize(
        "name, formula",
        [
            (
                "layer_norm",
                lambda x: (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + 1e-5).sqrt(),
            ),
            ("l2", lambda x: x / x.square().sum(-1, keepdim=True).sqrt()),
            ("sigmoid", lambda x: 1 / (1 + (-x).exp())),
            ("tanh", lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp())),
            ("none", lambda x: x),
        ],
    )
    @pytest.mark.parametrize("add_one", [True, False])
    def test_normalization_of_the_scale(
        self, name: str, formula: Callable[[torch.Tensor], torch.Tensor], add_one: bool
    ) -> None:
        config = NACConfig.from_preset("tiny", code_scale_normalization=name, add_one_to_code_scale=add_one)
        torch.manual_seed(0)
        linear = NACModulatedLinear(config, 6, 5).double()
        for parameter in linear.parameters():
            nn.init.normal_(parameter)
        inputs = [torch.randn(shape, dtype=torch.double, requires_grad=True) for shape in ((2, 4, 6), (4, 32))]
        hidden_states, codes = inputs
        scale = linear.gain * formula(codes @ linear.code_projection.weight.T) + float(add_one)
        expected = (hidden_states * scale) @ linear.weight.T + linear.bias
        ours = linear(hidden_states, codes)
        torch.testing.assert_close(ours, expected)
        wanted, probe = [*inputs, *linear.parameters()], torch.randn_like(ours)
        torch.testing.assert_close(
            torch.autograd.grad(ours, wanted, probe), torch.autograd.grad(expected, wanted, probe)
        )

    @pytest.mark.parametrize("has_layernorm", [True, False])
    def test_a_head_for_each_latent_before_they_are_pooled(self, has_layernorm: bool) -> None:
        model = nac(latent_head_size=7, head_layernorm=has_layernorm, pooling="softmax")
        states = torch.randn(3, 4, 48, requires_grad=True)
        head, codes = model.latent_head.projection, model.nac.output_latents.codes
        norm = nn.functional.layer_norm
        inputs = states if not has_layernorm else norm(states, (48,), *model.latent_head.layernorm.parameters())
        scale = head.gain * norm(codes @ head.code_projection.weight.T, (48,)) + 1
        latents = (inputs * scale) @ head.weight.T + head.bias
        weights = (latents @ model.pooling.confidence.weight[0]).softmax(-1)
        expected = model.classifier((latents * weights[..., None]).sum(1))
        ours = model.classify(states)
        assert ours.shape == (3, 5)
        torch.testing.assert_close(ours, expected)
        wanted = [states, codes, *model.latent_head.parameters(), model.pooling.confidence.weight]
        probe = torch.randn_like(ours)
        torch.testing.assert_close(
            torch.autograd.grad(ours, wanted, probe), torch.autograd.grad(expected, wanted, probe)
        )


class TestImageSizes:
    @pytest.mark.parametrize("height, width, tokens", [(32, 32, 16), (64, 64, 64), (24, 56, 21), (8, 8, 1)])
    def test_the_grid_is_interpolated(self, height: int, width: int, tokens: int) -> None:
        model = nac()
        images = torch.randn(2, 3, height, width)
        assert model.nac.tokenizer(images).shape == (2, tokens, 24 + 8)
        assert model(images).logits.isfinite().all()

    def test_at_its_own_size_the_grid_is_the_parameter(self) -> None:
        tokenizer = nac().nac.tokenizer
        assert tokenizer.interpolate_pos_encoding(4, 4) is tokenizer.position_embeddings

    def test_each_side_is_interpolated_by_itself(self) -> None:
        tokenizer = nac(image_size=[16, 32]).nac.tokenizer
        with torch.no_grad():
            tokenizer.position_embeddings.copy_(torch.arange(4.0).expand(1, 8, 2, 4))  # the same in every row
        grid = tokenizer.interpolate_pos_encoding(4, 4)
        assert torch.allclose(grid, torch.arange(4.0).expand(1, 8, 4, 4), atol=1e-5)

    def test_tokens_are_image_channels_then_position_channels(self) -> None:
        model = nac()
        tokens = model.nac.tokenizer(pixels())
        grid = model.nac.tokenizer.position_embeddings.flatten(2).transpose(1, 2)
        assert torch.equal(tokens[..., 24:], grid.expand(3, -1, -1))

    @pytest.mark.parametrize("shape, said", [((1, 32, 32), "1 channels.*is 3"), ((3, 7, 32), "7x32.*8x8")])
    def test_an_image_that_does_not_fit_is_refused(self, shape: tuple[int, ...], said: str) -> None:
        with pytest.raises(ValueError, match=said):
            nac()(torch.zeros(1, *shape))


class TestLosses:
    def test_the_loss_is_the_cross_entropy(self) -> None:
        outputs = nac()(pixels(), labels=LABELS)
        assert torch.allclose(outputs.loss, nn.functional.cross_entropy(outputs.logits, LABELS))
        assert outputs.aux_loss is None

    def test_losses_of_the_graph_are_weighed_and_named(self) -> None:
        model = nac(
            signature_repulsion_coef=0.5, signature_repulsion_hinge=1.0, block_model_coef=2.0,
            block_model_num_clusters=4,
        )  # fmt: skip
        outputs = model(pixels(), labels=LABELS)
        aux_loss = 0.5 * outputs.signature_repulsion_loss + 2.0 * outputs.block_model_loss
        assert torch.allclose(outputs.aux_loss, aux_loss)
        cross_entropy = nn.functional.cross_entropy(outputs.logits, LABELS)
        assert torch.allclose(outputs.loss, cross_entropy + outputs.aux_loss)

    def test_repulsion_is_of_all_signatures(self) -> None:
        model = nac(signature_repulsion_coef=1.0, signature_repulsion_hinge=1.0)
        after = gradients(model, model(pixels(), labels=LABELS).signature_repulsion_loss)
        moved = {name for name, gradient in after.items() if gradient.abs().sum() > 0}
        assert moved == {f"nac.{latents}_latents.signatures" for latents in ("input", "mediator", "output")}

    def test_the_block_model_loss_is_summed_over_the_rounds(self) -> None:
        model = nac(block_model_coef=1.0, block_model_num_clusters=4)
        signatures, graphon = model.nac.mediator_latents.signatures, block_model_graphon(24, 4, 0.9, 0.2)
        expected = [
            block_model_loss(link_probability(signatures, signatures, layer.kernel.bandwidth, 0.9), graphon)
            for layer in model.nac.layers
        ]
        assert torch.allclose(model.graph_losses()["block_model_loss"], sum(expected))

    def test_no_weight_no_loss(self) -> None:
        assert nac().graph_losses() == {}

    @pytest.mark.parametrize("form", FORMS)
    def test_every_parameter_of_every_form_is_trained(self, form: str) -> None:
        if form == "no_labels":
            pytest.skip("there is nothing to learn")
        model = nac(**FORMS[form]).train()
        outputs = model(pixels(), labels=LABELS)
        assert outputs.loss.isfinite()
        grads = gradients(model, outputs.loss)
        if model.pooling is not None:
            # it has a gradient, but the softmax does not see it: what is there is rounding
            assert model.pooling.confidence.bias.grad.abs() < 1e-6
            del grads["pooling.confidence.bias"]
        still = {name for name, gradient in grads.items() if gradient.abs().max() == 0}
        assert still == set()


class TestBandwidth:
    @pytest.mark.parametrize("bandwidth", [-0.5, -1e-4, 0.0])
    def test_a_learned_one_that_left_the_positive_numbers_counts_as_the_least(self, bandwidth: float) -> None:
        model = nac(stochastic_kernel=False, drop_path_rate=0.0)
        steps = []
        for value in (MIN_BANDWIDTH, bandwidth):
            with torch.no_grad():
                for kernel in (*(layer.kernel for layer in model.nac.layers), model.nac.read_out.kernel):
                    kernel.bandwidth.fill_(value)
            torch.manual_seed(0)
            outputs = model.train()(pixels(), labels=LABELS)
            steps.append((outputs.loss, gradients(model, outputs.loss)))
        assert steps[1][0].isfinite() and steps[1][0] == steps[0][0]
        for name, gradient in steps[1][1].items():
            expected = steps[0][1][name]
            if name.endswith("bandwidth"):
                # what would lead further down is cut off
                expected = expected.clamp(max=0)
            torch.testing.assert_close(gradient, expected, msg=name)

    def test_the_gradient_leads_back(self) -> None:
        bandwidth = torch.tensor(-0.3, requires_grad=True)
        (LowerBound.apply(bandwidth, 0.01) - 1.0).square().backward()
        assert bandwidth.grad < 0
        above = torch.tensor(0.2, requires_grad=True)
        (LowerBound.apply(above, 0.01) - 0.1).square().backward()
        torch.testing.assert_close(above.grad, torch.tensor(0.2))

    def test_a_fixed_one_is_what_the_config_says(self) -> None:
        kernel = nac(learnable_bandwidth=False, kernel_bandwidth=0.001).nac.layers[0].kernel
        assert kernel.positive_bandwidth() == torch.tensor(0.001)


class TestInitialisation:
    def test_scales_start_where_the_config_says(self) -> None:
        config = NACConfig.from_preset(
            "tiny", layer_scale_init_value=0.3, read_in_layer_scale_init_value=0.6, code_scale_gain=0.2,
            kernel_bandwidth=0.7, tokenizer_layer_scale_init_value=1e-4,
        )  # fmt: skip
        state = NACForImageClassification(config).state_dict()
        for name, value in state.items():
            if name.endswith("gain"):
                assert value == torch.tensor(0.2), name
            elif name.endswith("bandwidth"):
                assert value == torch.tensor(0.7), name
            elif name == "nac.read_in.attention.layer_scale":
                assert (value == 0.6).all()
            elif name.endswith("layer_scale"):
                assert (value == (1e-4 if "tokenizer" in name else 0.3)).all(), name
            elif "norm" in name:
                assert (value == (1.0 if name.endswith("weight") else 0.0)).all(), name
        assert (state["nac.latent_seeder.log_variance.bias"] == -5.0).all()

    def test_a_model_that_was_built_without_memory_is_initialised_when_it_gets_some(self) -> None:
        config = NACConfig.from_preset("tiny", graph_prior="grid", **PRIORS["grid"])
        model = on_meta(lambda: NACForImageClassification(config))
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(math.nan)
                parameter._is_hf_initialized = False
        for module in model.modules():
            module._is_hf_initialized = False
        model.init_weights()
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        graph = make_graph("grid", 24, config.graph_prior_kwargs, 0)
        assert torch.equal(shown_graph(model), adjacency_matrix(graph).bool())

    def test_tensors_missing_from_a_checkpoint_are_initialised(self, tmp_path) -> None:
        nac().nac.save_pretrained(tmp_path)
        model = NACForImageClassification.from_pretrained(tmp_path)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
        assert 0 < model.classifier.weight.std() < 0.3


class Images(Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        image = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(index))
        return {"pixel_values": image, "labels": torch.tensor(index % 5)}


class TestOrdinaryTrainer:
    def test_it_trains_every_parameter(self, tmp_path) -> None:
        model = nac(signature_repulsion_coef=0.1)
        before = snapshot(model)
        args = TrainingArguments(
            tmp_path, use_cpu=True, max_steps=2, per_device_train_batch_size=6, learning_rate=0.01, report_to=[],
            save_strategy="no", disable_tqdm=True, weight_decay=0.0,
        )  # fmt: skip
        trainer = Trainer(model, args, train_dataset=Images())
        losses = trainer.train()
        # a constant added to all confidences does not change the pooling: nothing but round-off moves their bias
        assert set(before) - changed(model, before) <= {"pooling.confidence.bias"}
        assert math.isfinite(losses.training_loss)
        assert trainer.predict(Images()).predictions.shape == (12, 5)
