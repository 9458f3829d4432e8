import random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from official_cases import FOLDER, Case
from transformers.utils import logging

from m2mkd.configuration.graph_prior_rules import GRAPH_PRIORS
from m2mkd.modeling.graph_priors import (
    adjacency_matrix,
    cosine_distance,
    fit_signatures,
    make_graph,
    signatures_for,
)


OFFICIAL = sorted(folder.name for folder in FOLDER.glob("graph_prior_*"))

# prior, arguments, nodes, edges (None where they are drawn)
GRAPHS = [
    ("barabasi_albert", {"m": 3}, 40, 111),
    ("planted_partition", {"l": 3, "k": 5, "p_in": 0.8, "p_out": 0.1}, 15, None),
    ("ring_of_cliques", {"num_cliques": 3, "clique_size": 5}, 15, 33),
    ("erdos_renyi", {"p": 0.3}, 21, None),
    ("watts_strogatz", {}, 31, 31),
    ("watts_strogatz", {"k": 6, "p": 0.2}, 31, 93),
    ("grid", {"dim": [3, 5]}, 15, 22),
    ("grid", {"dim": [3, 5], "periodic": True}, 15, 30),
    ("balanced_tree", {"r": 2, "h": 3}, 15, 14),
    ("balanced_tree", {"r": 2, "h": 3}, 16, 15),
    ("balanced_tree", {"r": 1, "h": 5}, 7, 6),
    ("barbell", {"m1": 4}, 8, 13),
    ("barbell", {"m1": 4, "m2": 3}, 11, 16),
    ("hypercube", {}, 16, 32),
    ("complete", {}, 9, 36),
]
DRAWN = [
    case for case in GRAPHS if case[0] in ("barabasi_albert", "planted_partition", "erdos_renyi", "watts_strogatz")
]


def adjacency(name: str, num_latents: int, kwargs: dict[str, Any], seed: int = 0) -> torch.Tensor:
    return adjacency_matrix(make_graph(name, num_latents, kwargs, seed))


def official_adjacency(case: Case) -> torch.Tensor:
    name = case.config["graph_type"].removesuffix("-graph").replace("-", "_")
    kwargs = {key: value for key, value in case.config["graph_kwargs"].items() if key != "n"}
    return adjacency(name, case.config["num_latents"], kwargs, case.config["seed"])


def official_loss(case: Case) -> str:
    return "hinge" if case.config["use_hinge_loss"] else "mse"


def autograd_fit(
    adjacency: torch.Tensor, target: torch.Tensor, truncation: float, loss: str, num_steps: int, initial: torch.Tensor
) -> torch.Tensor:
    """The plain form of `fit_signatures`."""
    signatures = initial.clone().requires_grad_()
    optimizer = torch.optim.Adam([signatures], lr=1e-3)
    for _ in range(num_steps):
        unit = F.normalize(signatures, dim=-1)
        distance = 1 - unit @ unit.T
        if loss == "hinge":
            too_far, too_near = distance.clamp(min=truncation), (-distance).clamp(min=-truncation)
            value = torch.where(adjacency == 1, too_far, too_near).mean()
        else:
            value = (distance - target).pow(2).mean()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    return signatures.detach()


class TestMakeGraph:
    @pytest.mark.parametrize("name", OFFICIAL)
    def test_the_official_graph(self, name: str) -> None:
        case = Case(name)
        assert torch.equal(official_adjacency(case), case.outputs["adjacency"])

    @pytest.mark.parametrize("name, kwargs, num_latents, edges", GRAPHS)
    def test_nodes_and_edges(self, name: str, kwargs: dict[str, Any], num_latents: int, edges: int | None) -> None:
        graph = make_graph(name, num_latents, kwargs, seed=3)
        assert list(graph.nodes) == list(range(num_latents))
        assert edges in (None, graph.number_of_edges())
        matrix = adjacency_matrix(graph)
        assert matrix.dtype == torch.float32
        assert matrix.sum() == 2 * graph.number_of_edges()
        assert torch.equal(matrix, matrix.T)
        assert not matrix.diagonal().any()

    def test_every_prior_is_covered(self) -> None:
        assert {case[0] for case in GRAPHS} == set(GRAPH_PRIORS)

    @pytest.mark.parametrize("name, kwargs, num_latents, edges", DRAWN)
    def test_the_seed_decides_and_nothing_else(
        self, name: str, kwargs: dict[str, Any], num_latents: int, edges: int | None
    ) -> None:
        state = random.getstate()
        first = adjacency(name, num_latents, kwargs, seed=5)
        assert random.getstate() == state
        random.seed(1)
        assert torch.equal(first, adjacency(name, num_latents, kwargs, seed=5))
        assert not torch.equal(first, adjacency(name, num_latents, kwargs, seed=6))

    def test_the_spare_leaf_hangs_on_the_last_node(self) -> None:
        tree, larger = (adjacency("balanced_tree", nodes, {"r": 2, "h": 3}) for nodes in (15, 16))
        assert torch.equal(larger[:15, :15], tree)
        assert larger[15].nonzero().tolist() == [[14]]

    def test_a_graph_without_edges(self) -> None:
        assert not adjacency("erdos_renyi", 6, {"p": 0}).any()

    def test_a_prior_that_cannot_be_drawn_is_refused(self) -> None:
        with pytest.raises(ValueError, match="power of two"):
            make_graph("hypercube", 24, {}, seed=0)
        with pytest.raises(ValueError, match="no graph"):
            make_graph(None, 24, {}, seed=0)


class TestCosineDistance:
    def test_values(self) -> None:
        a = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
        b = torch.tensor([[5.0, 0.0], [-1.0, 0.0], [1.0, 1.0]])
        diagonal = 1 - 0.5**0.5
        assert torch.allclose(cosine_distance(a, b), torch.tensor([[0.0, 2.0, diagonal], [1.0, 1.0, diagonal]]))

    def test_autocast_does_not_round_it(self) -> None:
        signatures = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
        plain = cosine_distance(signatures, signatures)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(cosine_distance(signatures, signatures), plain)


class TestFitSignatures:
    @pytest.mark.parametrize("name", OFFICIAL)
    def test_the_official_fit(self, name: str) -> None:
        case = Case(name)
        matrix, width = official_adjacency(case), case.config["signature_dim"]
        # Adam and the kinks of the hinge amplify the last bit: 1e-6 after 10 steps, and 6e-3 later
        for num_steps, tolerance in ((10, 1e-6), (100, 6e-3), (1000, 6e-3)):
            signatures, error = fit_signatures(
                matrix,
                width,
                case.config["truncation"],
                loss=official_loss(case),
                num_steps=num_steps,
                initial=case.inputs["initial_signatures"],
            )
            official = case.outputs[f"signatures_after.{num_steps}"]
            assert (signatures - official).abs().max() <= tolerance
        distance = cosine_distance(signatures, signatures)
        if official_loss(case) == "hinge":
            assert error == pytest.approx(case.config["score"], abs=1e-7)
        else:
            score = (distance - case.outputs["target"]).pow(2).mean().item()
            assert score == pytest.approx(case.config["score"], abs=1e-7)

    def test_the_official_start(self) -> None:
        case = Case("graph_prior_grid_graph")
        start, _ = fit_signatures(official_adjacency(case), 16, 0.8, num_steps=0, seed=case.config["seed"])
        assert torch.allclose(start, case.inputs["initial_signatures"], atol=1e-6)

    @pytest.mark.parametrize("loss", ["hinge", "mse"])
    @pytest.mark.parametrize("truncation", [0.9, 0.5])
    @pytest.mark.parametrize("num_latents, width", [(20, 7), (9, 12)])
    def test_it_equals_its_plain_form(self, loss: str, truncation: float, num_latents: int, width: int) -> None:
        import networkx

        graph = make_graph("barabasi_albert", num_latents, {"m": 2}, seed=1)
        matrix = adjacency_matrix(graph)
        lengths = torch.tensor(networkx.floyd_warshall_numpy(graph), dtype=torch.float32)
        initial = torch.randn(num_latents, width, generator=torch.Generator().manual_seed(2))
        signatures, error = fit_signatures(matrix, width, truncation, loss=loss, num_steps=15, initial=initial)
        plain = autograd_fit(matrix, lengths / lengths.max(), truncation, loss, 15, initial)
        assert torch.allclose(signatures, plain, atol=1e-6)
        linked = (cosine_distance(plain, plain) < truncation) & ~torch.eye(num_latents, dtype=torch.bool)
        assert error == pytest.approx((linked != matrix.bool()).float().mean().item())

    def test_nodes_without_a_path_are_the_farthest_apart(self) -> None:
        matrix = torch.zeros(4, 4)
        matrix[0, 1] = matrix[1, 0] = matrix[2, 3] = matrix[3, 2] = 1.0
        signatures, _ = fit_signatures(matrix, 4, 0.9, loss="mse", num_steps=2000, learning_rate=1e-2)
        # every path has length 1, so all nodes should be at distance 1 from all others
        assert torch.allclose(cosine_distance(signatures, signatures), 1 - torch.eye(4), atol=1e-2)

    def test_a_seed_is_a_result_and_the_global_state_is_left_alone(self) -> None:
        matrix = adjacency("erdos_renyi", 12, {"p": 0.3})
        state = torch.random.get_rng_state()
        first, _ = fit_signatures(matrix, 6, 0.9, num_steps=5, seed=1)
        assert torch.equal(torch.random.get_rng_state(), state)
        torch.manual_seed(7)
        assert torch.equal(fit_signatures(matrix, 6, 0.9, num_steps=5, seed=1)[0], first)
        assert not torch.equal(fit_signatures(matrix, 6, 0.9, num_steps=5, seed=2)[0], first)

    def test_the_surroundings_change_nothing(self) -> None:
        matrix = adjacency("erdos_renyi", 12, {"p": 0.3})
        plain, _ = fit_signatures(matrix, 6, 0.9, num_steps=20)
        assert not plain.requires_grad
        assert plain.grad is None
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            with torch.no_grad(), torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
                inside, _ = fit_signatures(matrix, 6, 0.9, num_steps=20)
        finally:
            torch.set_default_dtype(default)
        assert inside.dtype == torch.float32
        assert torch.equal(inside, plain)

    def test_the_start_is_not_overwritten(self) -> None:
        initial = torch.eye(4)
        fit_signatures(adjacency("hypercube", 4, {}), 4, 0.9, num_steps=3, initial=initial)
        assert torch.equal(initial, torch.eye(4))

    def test_the_bar_shows_the_loss_after_a_second(self, monkeypatch: pytest.MonkeyPatch) -> None:
        bars: list[Any] = []

        def hook(factory: Any, args: tuple, kwargs: dict) -> Any:
            bars.append((factory(*args, **{**kwargs, "disable": True}), kwargs))
            bars[-1][0].set_postfix = lambda **postfix: postfixes.append(postfix)
            return bars[-1][0]

        postfixes: list[dict[str, Any]] = []
        previous = logging.set_tqdm_hook(hook)
        try:
            fit_signatures(adjacency("hypercube", 4, {}), 4, 0.9, num_steps=60)
            fit_signatures(adjacency("hypercube", 4, {}), 4, 0.9, num_steps=60, progress=False)
        finally:
            logging.set_tqdm_hook(previous)
        (_, shown), (_, hidden) = bars
        assert (shown["disable"], hidden["disable"]) == (False, True)
        assert shown["delay"] == 1.0
        # at the orthogonal start a link is 0.1 too far and a stranger well placed: (8 * 1 - 4 * 0 - 4 * 0.9) / 16
        assert postfixes[0]["loss"] == f"{(8 * 1.0 - 4 * 0.9) / 16:.6f}"
        assert len(postfixes) == 2

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"adjacency": torch.zeros(3)}, "square"),
            ({"adjacency": torch.zeros(3, 4)}, "square"),
            ({"adjacency": torch.eye(3)}, "diagonal"),
            ({"adjacency": torch.tensor([[0.0, 1.0], [0.0, 0.0]])}, "symmetric"),
            ({"adjacency": torch.tensor([[0.0, 0.5], [0.5, 0.0]])}, "0 and 1"),
            ({"signature_size": 0}, "`signature_size`"),
            ({"truncation": 0.0}, r"`truncation` .* must be in \(0, 2\]"),
            ({"truncation": 2.1}, r"`truncation` .* must be in \(0, 2\]"),
            ({"loss": "l1"}, "`loss`"),
            ({"loss": "mse"}, "without edges|needs a graph with edges"),
            ({"num_steps": -1}, "`num_steps`"),
            ({"initial": torch.zeros(3, 5)}, "`initial`"),
        ],
    )
    def test_what_does_not_fit_is_refused(self, overrides: dict[str, Any], message: str) -> None:
        arguments = {"adjacency": torch.zeros(3, 3), "signature_size": 4, "truncation": 0.9}
        with pytest.raises(ValueError, match=message):
            fit_signatures(**{**arguments, **overrides})


class TestSignaturesFor:
    def test_graph_and_fit_share_the_seed(self) -> None:
        signatures, error = signatures_for("erdos_renyi", 12, {"p": 0.3}, 8, 0.9, seed=4)
        expected = fit_signatures(adjacency("erdos_renyi", 12, {"p": 0.3}, seed=4), 8, 0.9, seed=4)
        assert torch.equal(signatures, expected[0])
        assert error == expected[1]

    def test_all_signatures_of_the_complete_graph_are_the_first_unit_vector(self) -> None:
        signatures, error = signatures_for("complete", 5, {}, 3, 0.9, seed=0)
        assert signatures.tolist() == [[1.0, 0.0, 0.0]] * 5
        assert error == 0.0

    @pytest.mark.parametrize(
        "name, kwargs",
        [("ring_of_cliques", {"num_cliques": 8, "clique_size": 8}), ("barabasi_albert", {"m": 2}), ("hypercube", {})],
    )
    def test_the_distances_show_the_graph(self, name: str, kwargs: dict[str, Any]) -> None:
        signatures, error = signatures_for(name, 64, kwargs, 64, 0.9, seed=0)
        assert signatures.shape == (64, 64)
        assert error < 0.002

    def test_a_prior_that_does_not_fit_is_refused(self) -> None:
        with pytest.raises(ValueError, match="graph_prior_kwargs"):
            signatures_for("planted_partition", 24, {"l": 5, "k": 5, "p_in": 1.0, "p_out": 0.0}, 8, 0.9, seed=0)
