import logging
from pathlib import Path

import pytest
import torch
from testing_utils import images, nac, randomized, snapshot
from transformers import AutoModelForImageClassification

from m2mkd import NACForImageClassification
from m2mkd.modeling.latent_pruning import connectivity, gated_logits, importance, number_to_keep


VARIANTS = {
    "default": {},
    "inputs_send_first": {"input_to_mediator": "first"},
    "inputs_never_send": {"input_to_mediator": "none"},
    "no_inputs_to_outputs": {"input_to_output": False},
    "codes_of_each_layer": {"share_codes_between_layers": False},
    "learned_states": {"use_latent_seeder": False},
    "shared_propagators": {"share_propagators": True},
    "separate_layernorms": {"share_layernorm": False},
    "modulated_head": {"pooling": "first"},
}


def circuit(**overrides) -> NACForImageClassification:
    return randomized(nac(**{"num_mediator_latents": 9, "kernel_truncation": 1.2, **overrides}), seed=1).eval()


@torch.no_grad()
def logits_of(model: NACForImageClassification) -> torch.Tensor:
    return model(images()).logits


def set_signatures(model: NACForImageClassification, angles: list[float]) -> None:
    """Mediators on a circle, inputs and outputs orthogonal to it."""
    with torch.no_grad():
        for latents in (model.nac.input_latents, model.nac.output_latents, model.nac.mediator_latents):
            latents.signatures.zero_()
        model.nac.input_latents.signatures[:, 2] = 1
        model.nac.output_latents.signatures[:, 2] = 1
        angle = torch.tensor(angles)
        model.nac.mediator_latents.signatures[:, :2] = torch.stack((angle.cos(), angle.sin()), dim=-1)


class TestNumberToKeep:
    @pytest.mark.parametrize(
        ("keep", "number"), [(1, 1), (9, 9), (1.0, 9), (0.5, 4), (0.01, 1), (0.34, 3), (torch.tensor(2).item(), 2)]
    )
    def test_counts_and_shares(self, keep: float, number: int):
        assert number_to_keep(keep, 9) == number

    @pytest.mark.parametrize("keep", [0, -1, 10, 0.0, 1.5, -0.5, True, float("nan"), "all", None])
    def test_others_are_refused(self, keep: object):
        with pytest.raises(ValueError, match=r"`keep` must .*`num_mediator_latents`, 9.* but is "):
            number_to_keep(keep, 9)


class TestPruneLatents:
    @pytest.mark.parametrize("keep", [9, 1.0])
    @pytest.mark.parametrize("strategy", ["connectivity", "importance"])
    def test_all_latents_are_the_same_model(self, keep: float, strategy: str):
        model = circuit()
        pruned = model.prune_latents(keep, strategy, images())
        torch.testing.assert_close(logits_of(pruned), logits_of(model), atol=0, rtol=0)
        ours, theirs = ({p.data_ptr() for p in net.parameters()} for net in (model, pruned))
        assert not ours & theirs

    @pytest.mark.parametrize("backend", ["eager", "sdpa"])
    @pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
    def test_equals_the_whole_model_without_the_messages_of_the_others(
        self, options: dict, backend: str, monkeypatch: pytest.MonkeyPatch
    ):
        model = circuit(**options)
        model.set_attn_implementation(backend)
        pruned = logits_of(model.prune_latents(4))
        order = connectivity(model).argsort(descending=True, stable=True)
        kept, removed = order[:4], order[4:]
        with torch.no_grad():
            affinities = [affinity.clone() for affinity in model.nac.log_affinities()]
        for affinity in affinities:
            # the mediators are the last senders of every round; what the removed ones receive, nobody reads
            receivers = torch.arange(len(affinity)) if affinity is affinities[-1] else kept
            affinity[receivers[:, None], affinity.shape[1] - 9 + removed] = -torch.inf
        monkeypatch.setattr(model.nac, "log_affinities", lambda: affinities)
        torch.testing.assert_close(pruned, logits_of(model), atol=1e-5, rtol=1e-5)

    def test_what_is_kept_keeps_its_order_and_values(self):
        model = circuit(share_codes_between_layers=False, use_latent_seeder=False)
        kept = connectivity(model).topk(4).indices.sort().values
        before, after = snapshot(model), snapshot(model.prune_latents(4))
        for name, tensor in before.items():
            expected = tensor
            if name.startswith("nac.mediator_latents."):
                expected = tensor[:, kept] if name.endswith("codes") else tensor[kept]
            torch.testing.assert_close(after[name], expected, atol=0, rtol=0)

    def test_leaves_the_model_and_the_random_numbers_alone(self):
        model = circuit().train()
        model.nac.tokenizer.requires_grad_(False)
        before, state = snapshot(model), torch.random.get_rng_state()
        pruned = model.prune_latents(3)
        assert torch.equal(torch.random.get_rng_state(), state)
        assert all(torch.equal(tensor, before[name]) for name, tensor in snapshot(model).items())
        assert model.config.num_mediator_latents == 9
        assert pruned.training
        assert {name for name, p in pruned.named_parameters() if not p.requires_grad} == {
            name for name, p in model.named_parameters() if not p.requires_grad
        }

    def test_can_be_trained_and_pruned_again(self):
        pruned = circuit(signature_repulsion_coef=0.1).train().prune_latents(6)
        pruned(images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        assert pruned.nac.mediator_latents.codes.grad.shape == (6, 6)
        assert pruned.prune_latents(0.5).config.num_mediator_latents == 3

    def test_saved_and_loaded(self, tmp_path: Path):
        model = circuit(graph_prior="ring_of_cliques", graph_prior_kwargs={"num_cliques": 3, "clique_size": 3})
        pruned = model.prune_latents(5)
        assert model.config.graph_prior == "ring_of_cliques"
        pruned.save_pretrained(tmp_path)
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path)
        assert loaded.config.num_mediator_latents == 5
        assert loaded.config.graph_prior is None and loaded.config.graph_prior_kwargs == {}
        torch.testing.assert_close(logits_of(loaded), logits_of(pruned), atol=1e-6, rtol=0)

    def test_the_block_model_loss_is_switched_off(self, caplog: pytest.LogCaptureFixture):
        model = circuit(block_model_coef=0.1, block_model_num_clusters=3)
        assert model.prune_latents(9).config.block_model_coef == 0.1
        logger = logging.getLogger("m2mkd.modeling.latent_pruning")
        logger.addHandler(caplog.handler)
        try:
            assert model.prune_latents(6).config.block_model_coef == 0
        finally:
            logger.removeHandler(caplog.handler)
        assert "`block_model_coef` 0" in caplog.text

    def test_mediators_that_start_as_inputs_cannot_go(self):
        model = circuit(mediators_start_as_inputs=True, num_input_latents=9)
        assert model.prune_latents(9).config.num_mediator_latents == 9
        with pytest.raises(ValueError, match=r"`mediators_start_as_inputs` needs .*`keep` must keep all mediators"):
            model.prune_latents(8)

    def test_errors(self):
        model = circuit()
        with pytest.raises(ValueError, match=r"`keep` must be between 1 and .*`num_mediator_latents`, 9, but is 10"):
            model.prune_latents(10)
        with pytest.raises(ValueError, match=r"`strategy` must be one of \['connectivity', .*, but is 'x'"):
            model.prune_latents(3, "x")
        with pytest.raises(ValueError, match=r"`pixel_values` is None"):
            model.prune_latents(3, "importance")
        with pytest.raises(ValueError, match=r"`num_labels` of at least 2, but `num_labels` is 0"):
            circuit(num_labels=0).prune_latents(3, "importance", images())


class TestConnectivity:
    def test_is_the_expected_number_of_edges(self):
        model = circuit(kernel_truncation=1.0)
        degree = torch.zeros(9)
        with torch.no_grad():
            *rounds, read_out = [affinity.exp() for affinity in model.nac.log_affinities()]
        assert any((affinity == 0).any() for affinity in rounds)
        for latent in range(9):
            degree[latent] = read_out[:, 3 + latent].sum()
            for affinity in rounds:
                degree[latent] += affinity[:, 3 + latent].sum() + affinity[latent].sum()
        torch.testing.assert_close(connectivity(model), degree)

    def test_latents_without_neighbours_go_first(self):
        model = circuit(kernel_truncation=0.5)
        set_signatures(model, [0.0, 3.0, 0.1, 0.2, 4.5, 0.3, 0.4, 0.5, 0.6])
        codes = model.nac.mediator_latents.codes
        expected = torch.cat((codes[:1], codes[2:4], codes[5:]))
        torch.testing.assert_close(model.prune_latents(7).nac.mediator_latents.codes, expected, atol=0, rtol=0)

    def test_of_equal_ones_the_first_stay(self):
        model = circuit()
        set_signatures(model, [0.0] * 9)
        kept = model.prune_latents(4).nac.mediator_latents.codes
        torch.testing.assert_close(kept, model.nac.mediator_latents.codes[:4], atol=0, rtol=0)


class TestImportance:
    def test_is_the_derivative_of_the_log_odds(self):
        model, pixel_values, eps = circuit().double(), images().double(), 1e-5
        best = logits_of(model).argmax(-1)

        @torch.no_grad()
        def log_odds(latent: int, gate: float) -> torch.Tensor:
            gates = torch.zeros(3, 1, 9, dtype=torch.double)
            gates[:, :, latent] = torch.tensor(gate).double().log()
            probabilities = gated_logits(model, pixel_values, gates).softmax(-1)
            return torch.logit(probabilities.gather(1, best[:, None])[:, 0])

        expected = [
            ((log_odds(latent, 1 + eps) - log_odds(latent, 1 - eps)) / (2 * eps)).abs().mean() for latent in range(9)
        ]
        ours = importance(model, pixel_values)
        torch.testing.assert_close(ours.double(), torch.stack(expected), atol=1e-6, rtol=1e-2)

    def test_a_latent_that_nobody_hears_goes_first(self):
        model = circuit(kernel_truncation=0.5, input_to_mediator="none")
        with torch.no_grad():
            # the read-out all but ignores what lies opposite to the outputs
            model.nac.read_out.kernel.bandwidth.fill_(0.02)
        set_signatures(model, [0.0, 0.1, 0.2, 0.3, 3.1, 0.4, 0.5, 0.6, 0.7])
        with torch.no_grad():
            model.nac.output_latents.signatures[:, :3] = torch.tensor([1.0, 0.0, 0.0])
        assert importance(model, images()).argmin() == 4

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    def test_leaves_no_trace(self, mode: type):
        model = circuit().train()
        with mode():
            scores = importance(model, images())
            assert torch.equal(scores, importance(model, images()))
        assert model.training
        assert all(parameter.grad is None for parameter in model.parameters())
        assert not scores.requires_grad
