from typing import Any

import pytest

from m2mkd.configuration.graph_prior_rules import (
    GRAPH_PRIORS,
    check_graph_prior,
    num_tree_nodes,
    resolve_graph_prior_kwargs,
)


GOOD = [
    (None, {}, 7),
    ("barabasi_albert", {"m": 1}, 2),
    ("barabasi_albert", {"m": 23}, 24),
    ("planted_partition", {"l": 4, "k": 6, "p_in": 1, "p_out": 0.0}, 24),
    ("ring_of_cliques", {"num_cliques": 2, "clique_size": 2}, 4),
    ("erdos_renyi", {"p": 0}, 5),
    ("watts_strogatz", {}, 24),
    ("watts_strogatz", {"k": 4, "p": 0.3}, 5),
    ("grid", {"dim": [4, 6]}, 24),
    ("grid", {"dim": (1, 5), "periodic": False}, 5),
    ("grid", {"dim": [2, 3], "periodic": True}, 6),
    ("balanced_tree", {"r": 2, "h": 3}, 15),
    ("balanced_tree", {"r": 2, "h": 3}, 16),
    ("balanced_tree", {"r": 1, "h": 6}, 7),
    ("balanced_tree", {"r": 1, "h": 6}, 8),
    ("balanced_tree", {"r": 5, "h": 1}, 6),
    ("barbell", {"m1": 12}, 24),
    ("barbell", {"m1": 2, "m2": 3}, 7),
    ("hypercube", {}, 2),
    ("hypercube", {}, 256),
    ("complete", {}, 1),
]

PLANTED = {"l": 4, "k": 6, "p_in": 0.9, "p_out": 0.2}

# prior, arguments, latents, and what the message must contain: the field, the rule or the way out
BAD = [
    ("scale-free", {}, 24, ["`graph_prior`", "'scale-free'", "'barabasi_albert'"]),
    (None, {"m": 2}, 24, ["`graph_prior_kwargs`", "`graph_prior` is None", "empty"]),
    ("complete", {}, 0, ["`num_mediator_latents`", "at least 1"]),
    ("complete", {}, True, ["`num_mediator_latents`", "whole number", "True"]),
    ("complete", {}, 4.0, ["`num_mediator_latents`", "whole number", "4.0"]),
    ("erdos_renyi", {"n": 24, "p": 0.1}, 24, ["`graph_prior_kwargs['n']`", "`num_mediator_latents`", "Leave it out"]),
    ("erdos_renyi", {"q": 0.1}, 24, ["`graph_prior_kwargs['q']`", "takes `p`", "Leave it out"]),
    ("hypercube", {"d": 3}, 8, ["`graph_prior_kwargs['d']`", "takes no arguments"]),
    ("erdos_renyi", {}, 24, ["`graph_prior_kwargs['p']`", "missing", "from 0 to 1"]),
    ("erdos_renyi", {"p": 1.1}, 24, ["`graph_prior_kwargs['p']`", "from 0 to 1", "1.1"]),
    ("erdos_renyi", {"p": float("nan")}, 24, ["`graph_prior_kwargs['p']`", "from 0 to 1"]),
    ("erdos_renyi", {"p": True}, 24, ["`graph_prior_kwargs['p']`", "True"]),
    ("erdos_renyi", {"p": "0.1"}, 24, ["`graph_prior_kwargs['p']`", "'0.1'"]),
    ("barabasi_albert", {"m": 0}, 24, ["`graph_prior_kwargs['m']`", "at least 1"]),
    ("barabasi_albert", {"m": 2.0}, 24, ["`graph_prior_kwargs['m']`", "whole number"]),
    ("barabasi_albert", {"m": True}, 24, ["`graph_prior_kwargs['m']`", "whole number"]),
    ("barabasi_albert", {"m": 24}, 24, ["`graph_prior_kwargs['m']`", "less than `num_mediator_latents`"]),
    ("planted_partition", {**PLANTED, "l": 5}, 24, ["`graph_prior_kwargs['l']", "['k']", "30 nodes", "is 24"]),
    ("planted_partition", {**PLANTED, "p_in": -0.1}, 24, ["`graph_prior_kwargs['p_in']`", "-0.1"]),
    ("planted_partition", {"l": 4, "k": 6, "p_in": 0.9}, 24, ["`graph_prior_kwargs['p_out']`", "missing"]),
    ("ring_of_cliques", {"num_cliques": 1, "clique_size": 24}, 24, ["['num_cliques']`", "at least 2"]),
    ("ring_of_cliques", {"num_cliques": 24, "clique_size": 1}, 24, ["['clique_size']`", "at least 2"]),
    ("ring_of_cliques", {"num_cliques": 4, "clique_size": 5}, 24, ["['num_cliques']", "['clique_size']", "20 nodes"]),
    ("watts_strogatz", {}, 10, ["`graph_prior_kwargs['k']`", "at least 2", "a tenth", "Set `graph_prior_kwargs"]),
    ("watts_strogatz", {"k": 1}, 24, ["`graph_prior_kwargs['k']`", "at least 2"]),
    ("watts_strogatz", {"k": 24}, 24, ["`graph_prior_kwargs['k']`", "less than"]),
    ("grid", {"dim": [4, 5]}, 24, ["`graph_prior_kwargs['dim']", "20 nodes", "is 24"]),
    ("grid", {"dim": [24]}, 24, ["`graph_prior_kwargs['dim']`", "two whole numbers"]),
    ("grid", {"dim": [2, 3, 4]}, 24, ["`graph_prior_kwargs['dim']`", "two whole numbers"]),
    ("grid", {"dim": [24.0, 1]}, 24, ["`graph_prior_kwargs['dim']`", "two whole numbers"]),
    ("grid", {"dim": 24}, 24, ["`graph_prior_kwargs['dim']`", "two whole numbers"]),
    ("grid", {"dim": [4, 6], "periodic": 1}, 24, ["`graph_prior_kwargs['periodic']`", "True or False"]),
    ("grid", {"dim": [1, 24], "periodic": True}, 24, ["`graph_prior_kwargs['dim']`", "at least 2", "['periodic']`"]),
    ("balanced_tree", {"r": 2, "h": 3}, 9, ["`graph_prior_kwargs['r']`", "['h']`", "15 nodes", "is 9"]),
    ("balanced_tree", {"r": 2, "h": 3}, 14, ["15 nodes", "is 14"]),
    ("balanced_tree", {"r": 2, "h": 3}, 17, ["15 nodes", "is 17"]),
    ("balanced_tree", {"r": 9, "h": 10**9}, 24, ["more nodes", "is 24"]),
    ("balanced_tree", {"r": 0, "h": 3}, 24, ["`graph_prior_kwargs['r']`", "at least 1"]),
    ("barbell", {"m1": 1}, 2, ["`graph_prior_kwargs['m1']`", "at least 2"]),
    ("barbell", {"m1": 12, "m2": -1}, 24, ["`graph_prior_kwargs['m2']`", "at least 0"]),
    ("barbell", {"m1": 12, "m2": 1}, 24, ["`graph_prior_kwargs['m1']", "['m2']", "25 nodes"]),
    ("hypercube", {}, 24, ["`num_mediator_latents`", "power of two", "Use 16 or 32"]),
    ("hypercube", {}, 1, ["`num_mediator_latents`", "power of two", "Use 2 or 4"]),
]


@pytest.mark.parametrize("name, kwargs, num_latents", GOOD)
def test_a_prior_that_can_be_drawn_passes(name: str | None, kwargs: dict[str, Any], num_latents: int) -> None:
    check_graph_prior(name, kwargs, num_latents)


def test_every_prior_has_a_good_case() -> None:
    assert {name for name, _, _ in GOOD} == {None, *GRAPH_PRIORS}


@pytest.mark.parametrize("name, kwargs, num_latents, parts", BAD)
def test_a_broken_rule_is_refused_by_field_and_rule(
    name: str | None, kwargs: dict[str, Any], num_latents: Any, parts: list[str]
) -> None:
    with pytest.raises(ValueError) as error:
        check_graph_prior(name, kwargs, num_latents)
    for part in parts:
        assert part in str(error.value)


def test_defaults_are_filled_in_and_given_values_kept() -> None:
    assert resolve_graph_prior_kwargs("watts_strogatz", {}, 24) == {"k": 2, "p": 0.4}
    assert resolve_graph_prior_kwargs("watts_strogatz", {"p": 0.1}, 256) == {"k": 26, "p": 0.1}
    assert resolve_graph_prior_kwargs("grid", {"dim": [2, 3]}, 6) == {"dim": [2, 3], "periodic": False}
    assert resolve_graph_prior_kwargs("barbell", {"m1": 3, "m2": 1}, 7) == {"m1": 3, "m2": 1}
    assert resolve_graph_prior_kwargs("hypercube", {}, 8) == {}


@pytest.mark.parametrize("r, h, nodes", [(1, 4, 5), (2, 3, 15), (3, 2, 13), (4, 1, 5)])
def test_a_tree_is_counted_level_by_level(r: int, h: int, nodes: int) -> None:
    assert num_tree_nodes(r, h) == nodes == sum(r**level for level in range(h + 1))
