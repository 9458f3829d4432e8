import builtins
import math
from typing import Any

import pytest
import torch
from official_cases import Case, assert_close, assert_gradients_close

from m2mkd.modeling.graph_losses import (
    block_model_graphon,
    block_model_loss,
    link_probability,
    signature_repulsion_loss,
)
from m2mkd.modeling.graph_priors import cosine_distance


SETS = ("input", "mediator", "output")
SIGNATURES = "latent_graphs.0.{}_latents.signatures_"
BANDWIDTH = "latent_graphs.0.propagators.{}.latent_attention.kernel.bandwidth"


def random_signatures(num_latents: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(num_latents, width, generator=torch.Generator().manual_seed(seed))


def at_angle(distance: float) -> torch.Tensor:
    """Two signatures at a cosine distance."""
    return torch.tensor([[1.0, 0.0], [1 - distance, math.sqrt(1 - (1 - distance) ** 2)]])


class TestOfficial:
    """Both regularisers on the official parameters, by their official names."""

    case = Case("graph_regularisers")

    def parameters(self) -> dict[str, torch.Tensor]:
        return {name: tensor.requires_grad_() for name, tensor in self.case.inputs.items()}

    def compare(self, name: str, loss: torch.Tensor, parameters: dict[str, torch.Tensor]) -> None:
        assert_close(loss, self.case.outputs[f"{name}.loss"], name)
        loss.backward()
        official = self.case.gradients(f"{name}.grad.")
        assert all(p.grad is None for key, p in parameters.items() if key not in official)
        assert_gradients_close({key: parameters[key] for key in official}, official)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_signature_repulsion(self, reduction: str) -> None:
        parameters = self.parameters()
        signatures = torch.cat([parameters[SIGNATURES.format(kind)] for kind in SETS])
        loss = signature_repulsion_loss(signatures, self.case.config["hinge"], reduction)
        self.compare(f"hinge_repulsion_{reduction}", loss, parameters)

    @pytest.mark.parametrize("name", ["sbm.0", "sbm.1", "sbm.2"])
    def test_block_model(self, name: str) -> None:
        parameters, kwargs = self.parameters(), self.case.config["sbm"][name]
        kinds = [kind for kind in SETS if kwargs.get(f"regularize_{kind}_latents", True)]
        signatures = torch.cat([parameters[SIGNATURES.format(kind)] for kind in kinds])
        graphon = block_model_graphon(
            signatures.shape[0], kwargs["num_clusters"], kwargs.get("p_in", 0.9), kwargs.get("p_out", 0.05)
        )
        assert torch.equal(graphon, self.case.outputs[f"{name}.sampled_graphon"])
        links = [
            link_probability(
                signatures, signatures, parameters[BANDWIDTH.format(layer)], self.case.config["truncation"]
            )
            for layer in range(3)
        ]
        assert_close(links[0], self.case.outputs[f"{name}.link_probability.0"], "link probability")
        loss = torch.stack([block_model_loss(link, graphon, kwargs.get("clip")) for link in links]).sum()
        self.compare(name, loss, parameters)


class TestLinkProbability:
    def test_values(self) -> None:
        a, b = random_signatures(4), random_signatures(5, seed=1)
        expected = torch.exp(-cosine_distance(a, b) / 0.7)
        assert torch.equal(link_probability(a, b, 0.7), expected)
        for truncation_type in ("direct", "masked"):
            cut = link_probability(a, b, 0.7, 0.9, truncation_type)
            near = cosine_distance(a, b) < 0.9
            assert near.any()
            assert not near.all()
            assert torch.equal(cut, torch.where(near, expected, torch.zeros(())))

    def test_a_pair_at_the_truncation_is_kept_by_direct_and_cut_by_masked(self) -> None:
        a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        assert link_probability(a, b, 1.0, 1.0, "direct").item() == pytest.approx(math.exp(-1))
        assert link_probability(a, b, 1.0, 1.0, "masked").item() == 0.0

    def test_only_masked_passes_a_gradient_through_a_cut_pair(self) -> None:
        gradients = {}
        for name, truncation, truncation_type in (
            ("uncut", None, "direct"),
            ("direct", 0.5, "direct"),
            ("masked", 0.5, "masked"),
        ):
            signatures = at_angle(0.8).requires_grad_()
            bandwidth = torch.tensor(0.7, requires_grad=True)
            probability = link_probability(signatures[:1], signatures[1:], bandwidth, truncation, truncation_type)
            assert (probability.item() == 0) is (truncation is not None)
            probability.sum().backward()
            gradients[name] = torch.cat([signatures.grad.flatten(), bandwidth.grad[None]])
        assert gradients["uncut"].norm() > 0.1
        assert torch.equal(gradients["masked"], gradients["uncut"])
        assert not gradients["direct"].any()

    def test_an_unknown_truncation_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`truncation_type`"):
            link_probability(random_signatures(2), random_signatures(2), 1.0, 0.9, "soft")


class TestSignatureRepulsionLoss:
    def test_only_pairs_below_the_hinge_count(self) -> None:
        angles = torch.tensor([0.0, 0.5, 0.9, 2.5])
        signatures = torch.stack([angles.cos(), angles.sin()], dim=-1)
        close = [
            1 - math.cos(abs(b - a))
            for i, a in enumerate(angles.tolist())
            for b in angles.tolist()[i + 1 :]
            if 1 - math.cos(abs(b - a)) < 0.3
        ]
        assert len(close) == 2
        assert signature_repulsion_loss(signatures, 0.3).item() == pytest.approx(-sum(close), rel=1e-5)
        assert signature_repulsion_loss(signatures, 0.3, "mean").item() == pytest.approx(-sum(close) / 2, rel=1e-5)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    def test_without_a_close_pair_value_and_gradient_are_zero(self, reduction: str) -> None:
        signatures = torch.eye(4, requires_grad=True)
        loss = signature_repulsion_loss(signatures, 0.4, reduction)
        assert loss.item() == 0
        loss.backward()
        assert torch.equal(signatures.grad, torch.zeros(4, 4))

    def test_a_step_drives_a_close_pair_apart(self) -> None:
        signatures = at_angle(0.1).requires_grad_()
        signature_repulsion_loss(signatures, 0.4).backward()
        moved = (signatures - 0.1 * signatures.grad).detach()
        assert cosine_distance(moved, moved)[0, 1] > 0.11

    def test_an_unknown_reduction_is_refused(self) -> None:
        with pytest.raises(ValueError, match="`reduction`"):
            signature_repulsion_loss(random_signatures(2), 0.4, "none")


class TestBlockModelGraphon:
    def test_values(self) -> None:
        i, o = 0.75, 0.25
        assert block_model_graphon(4, 2, i, o).tolist() == [[i, i, o, o], [i, i, o, o], [o, o, i, i], [o, o, i, i]]
        assert torch.equal(block_model_graphon(3, 3, 1, 0), torch.eye(3))

    @pytest.mark.parametrize("num_latents, num_clusters", [(24, 5), (24, 0), (0, 1)])
    def test_clusters_have_one_size(self, num_latents: int, num_clusters: int) -> None:
        with pytest.raises(ValueError, match="`num_latents` must be a positive multiple of `num_clusters`"):
            block_model_graphon(num_latents, num_clusters, 0.9, 0.2)

    @pytest.mark.parametrize("kwargs", [{"p_in": 1.5, "p_out": 0.2}, {"p_in": 0.5, "p_out": -0.2}])
    def test_probabilities(self, kwargs: dict[str, float]) -> None:
        with pytest.raises(ValueError, match="must be a probability"):
            block_model_graphon(4, 2, **kwargs)


class TestBlockModelLoss:
    def test_it_is_the_least_over_all_orders_of_the_rows(self) -> None:
        from itertools import permutations

        graphon = block_model_graphon(6, 3, 0.9, 0.1)
        links = torch.rand(6, 6, generator=torch.Generator().manual_seed(0))
        least = min((links[list(rows)] - graphon).pow(2).mean().item() for rows in permutations(range(6)))
        assert block_model_loss(links, graphon).item() == pytest.approx(least, rel=1e-5)

    def test_rows_in_another_order_cost_nothing_but_rows_and_columns_do(self) -> None:
        graphon = block_model_graphon(6, 3, 0.9, 0.1)
        order = torch.tensor([2, 0, 5, 3, 1, 4])
        assert block_model_loss(graphon[order], graphon).item() == 0
        assert block_model_loss(graphon[order][:, order], graphon).item() > 0.1

    def test_small_errors_are_clipped_and_have_no_gradient(self) -> None:
        graphon = block_model_graphon(2, 2, 0.9, 0.1)
        links = torch.tensor([[0.9, 0.2], [0.1, 0.4]], requires_grad=True)
        loss = block_model_loss(links, graphon, clip=0.04)
        assert loss.item() == pytest.approx((3 * 0.04 + 0.25) / 4)
        loss.backward()
        assert torch.allclose(links.grad, torch.tensor([[0.0, 0.0], [0.0, 2 * -0.5 / 4]]))

    def test_the_graphon_follows_the_links(self) -> None:
        links = block_model_graphon(4, 2, 0.9, 0.2).to(torch.float64)
        assert block_model_loss(links, block_model_graphon(4, 2, 0.9, 0.2)).dtype == torch.float64

    def test_other_sizes_are_refused(self) -> None:
        with pytest.raises(ValueError, match="same shape"):
            block_model_loss(torch.zeros(4, 4), block_model_graphon(6, 3, 0.9, 0.2))

    def test_without_scipy_the_way_out_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        find = builtins.__import__

        def without_scipy(name: str, *args: Any, **kwargs: Any) -> Any:
            if name.split(".")[0] == "scipy":
                raise ImportError(name)
            return find(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_scipy)
        with pytest.raises(ImportError, match="pip install scipy"):
            block_model_loss(torch.zeros(4, 4), block_model_graphon(4, 2, 0.9, 0.2))
