# Copyright 2026 The m2mkd authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""The graph priors of a NAC and the rules for their arguments. The graphs are drawn in `modeling`."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple


class GraphPriorArgument(NamedTuple):
    """
    Rule for one keyword argument of a graph prior.

    Args:
        kind (`str`): `"count"` (a whole number), `"probability"` (a number from 0 to 1), `"sizes"` (two whole numbers)
            or `"flag"`.
        minimum (`int`): The smallest count or size.
        required (`bool`): Whether the argument has no default.
    """

    kind: Literal["count", "probability", "sizes", "flag"]
    minimum: int = 1
    required: bool = True


# The names and arguments are those of networkx; the number of nodes is always `num_mediator_latents`.
GRAPH_PRIORS: dict[str, dict[str, GraphPriorArgument]] = {
    "barabasi_albert": {"m": GraphPriorArgument("count")},
    "planted_partition": {
        "l": GraphPriorArgument("count"),
        "k": GraphPriorArgument("count"),
        "p_in": GraphPriorArgument("probability"),
        "p_out": GraphPriorArgument("probability"),
    },
    "ring_of_cliques": {
        "num_cliques": GraphPriorArgument("count", minimum=2),
        "clique_size": GraphPriorArgument("count", minimum=2),
    },
    "erdos_renyi": {"p": GraphPriorArgument("probability")},
    "watts_strogatz": {
        "k": GraphPriorArgument("count", minimum=2, required=False),
        "p": GraphPriorArgument("probability", required=False),
    },
    "grid": {"dim": GraphPriorArgument("sizes"), "periodic": GraphPriorArgument("flag", required=False)},
    "balanced_tree": {"r": GraphPriorArgument("count"), "h": GraphPriorArgument("count")},
    "barbell": {
        "m1": GraphPriorArgument("count", minimum=2),
        "m2": GraphPriorArgument("count", minimum=0, required=False),
    },
    "hypercube": {},
    "complete": {},
}


def check_graph_prior(name: str | None, kwargs: Mapping[str, Any], num_latents: int) -> None:
    """
    Check that a graph prior can be drawn for `num_latents` mediator latents.

    Args:
        name (`str`, *optional*): A key of `GRAPH_PRIORS`; `None` for random signatures, without a graph.
        kwargs (`Mapping`): The arguments of the prior.
        num_latents (`int`): The number of mediator latents, which is the number of nodes.

    Raises:
        `ValueError`: the prior is unknown, an argument is unknown, missing, of the wrong type or out of range, or the
            graph would not have `num_latents` nodes.
    """
    if not _is_whole(num_latents) or num_latents < 1:
        raise ValueError(f"`num_mediator_latents` must be a whole number of at least 1, but is {num_latents!r}.")
    if name is not None and name not in GRAPH_PRIORS:
        raise ValueError(f"`graph_prior` must be None or one of {sorted(GRAPH_PRIORS)}, but is {name!r}.")
    if name is None:
        if kwargs:
            raise ValueError(
                f"`graph_prior_kwargs` is {dict(kwargs)}, but `graph_prior` is None: there is no graph to draw. "
                f"Leave `graph_prior_kwargs` empty, or set `graph_prior` to one of {sorted(GRAPH_PRIORS)}."
            )
        return
    _check_names(name, kwargs, num_latents)
    for key, value in kwargs.items():
        _check_value(key, value, GRAPH_PRIORS[name][key])
    _check_size(name, resolve_graph_prior_kwargs(name, kwargs, num_latents), num_latents)


def resolve_graph_prior_kwargs(name: str, kwargs: Mapping[str, Any], num_latents: int) -> dict[str, Any]:
    """
    The arguments of a graph prior, completed with defaults. For `"watts_strogatz"`, `k` is a tenth of the latents and
    `p` is 0.4 (as in the official code); `"grid"` is not periodic; `m2` of `"barbell"` is 0.
    """
    defaults: dict[str, dict[str, Any]] = {
        "watts_strogatz": {"k": round(0.1 * num_latents), "p": 0.4},
        "grid": {"periodic": False},
        "barbell": {"m2": 0},
    }
    return {**defaults.get(name, {}), **kwargs}


def num_tree_nodes(r: int, h: int) -> int:
    """Number of nodes of a balanced tree: `1 + r + … + r^h`."""
    return h + 1 if r == 1 else (r ** (h + 1) - 1) // (r - 1)


def _check_names(name: str, kwargs: Mapping[str, Any], num_latents: int) -> None:
    arguments = GRAPH_PRIORS[name]
    takes = "takes " + ", ".join(f"`{key}`" for key in arguments) if arguments else "takes no arguments"
    for key in kwargs:
        if key == "n":
            raise ValueError(
                "`graph_prior_kwargs['n']` is not accepted: the number of nodes is `num_mediator_latents` "
                f"({num_latents}). Leave it out."
            )
        if key not in arguments:
            raise ValueError(
                f"`graph_prior_kwargs[{key!r}]` is not an argument of `graph_prior` '{name}', which {takes}. Leave it "
                "out."
            )
    for key, argument in arguments.items():
        if argument.required and key not in kwargs:
            raise ValueError(
                f"`graph_prior_kwargs['{key}']` is missing: `graph_prior` '{name}' {takes}. Set it to "
                f"{_describe(argument)}."
            )


def _check_value(key: str, value: Any, argument: GraphPriorArgument) -> None:
    if argument.kind == "count":
        good = _is_whole(value) and value >= argument.minimum
    elif argument.kind == "probability":
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    elif argument.kind == "sizes":
        good = isinstance(value, list | tuple) and len(value) == 2
        good = good and all(_is_whole(size) and size >= argument.minimum for size in value)
    else:
        good = isinstance(value, bool)
    if not good:
        raise ValueError(f"`graph_prior_kwargs['{key}']` must be {_describe(argument)}, but is {value!r}.")


def _check_size(name: str, kwargs: dict[str, Any], num_latents: int) -> None:
    match name:
        case "planted_partition":
            _check_product(kwargs["l"] * kwargs["k"], "['l'] * graph_prior_kwargs['k']", num_latents)
        case "ring_of_cliques":
            product = kwargs["num_cliques"] * kwargs["clique_size"]
            _check_product(product, "['num_cliques'] * graph_prior_kwargs['clique_size']", num_latents)
        case "grid":
            _check_product(math.prod(kwargs["dim"]), "['dim'][0] * graph_prior_kwargs['dim'][1]", num_latents)
            if kwargs["periodic"] and min(kwargs["dim"]) < 2:
                raise ValueError(
                    f"`graph_prior_kwargs['dim']` is {kwargs['dim']}, but a periodic grid needs sizes of at least 2: "
                    "otherwise its nodes are linked to themselves. Increase the sizes, or set "
                    "`graph_prior_kwargs['periodic']` to False."
                )
        case "barbell":
            _check_product(2 * kwargs["m1"] + kwargs["m2"], "['m1'] * 2 + graph_prior_kwargs['m2']", num_latents)
        case "barabasi_albert":
            _check_below("m", kwargs["m"], num_latents)
        case "watts_strogatz":
            _check_neighbours(kwargs["k"], num_latents)
        case "balanced_tree":
            _check_tree(kwargs["r"], kwargs["h"], num_latents)
        case "hypercube":
            _check_power_of_two(num_latents)


def _check_product(nodes: int, rule: str, num_latents: int) -> None:
    if nodes != num_latents:
        raise ValueError(
            f"`graph_prior_kwargs{rule}` must be `num_mediator_latents`, but the graph has {nodes} nodes and "
            f"`num_mediator_latents` is {num_latents}. Change one of them to match the other."
        )


def _check_below(key: str, value: int, num_latents: int) -> None:
    if value >= num_latents:
        raise ValueError(
            f"`graph_prior_kwargs['{key}']` must be less than `num_mediator_latents`, but is {value} and "
            f"`num_mediator_latents` is {num_latents}. Lower it, or increase `num_mediator_latents`."
        )


def _check_neighbours(k: int, num_latents: int) -> None:
    if k < 2:
        raise ValueError(
            f"`graph_prior_kwargs['k']` must be at least 2, but its default, a tenth of `num_mediator_latents` "
            f"({num_latents}), is {k}. Set `graph_prior_kwargs['k']`."
        )
    _check_below("k", k, num_latents)


def _check_tree(r: int, h: int, num_latents: int) -> None:
    # With two or more branches per node, a tree has more than 2^h nodes, so a height above the bit length of
    # num_latents is always too large. Its nodes are not counted: the power of a mistyped height would take forever.
    nodes = num_tree_nodes(r, h) if r == 1 or h <= num_latents.bit_length() else None
    if nodes not in (num_latents, num_latents - 1):
        has = "more" if nodes is None else nodes
        raise ValueError(
            f"`graph_prior_kwargs['r']` {r} and `graph_prior_kwargs['h']` {h} must make a tree of "
            "`num_mediator_latents` nodes, or of one node less (a leaf is then added to its last node), but the tree "
            f"has {has} nodes and `num_mediator_latents` is {num_latents}. Change one of them to match the others."
        )


def _check_power_of_two(num_latents: int) -> None:
    if num_latents < 2 or num_latents & (num_latents - 1):
        below = max(2 ** (num_latents.bit_length() - 1), 2)
        raise ValueError(
            "`num_mediator_latents` must be a power of two, at least 2, for `graph_prior` 'hypercube', but is "
            f"{num_latents}. Use {below} or {2 * below}."
        )


def _describe(argument: GraphPriorArgument) -> str:
    return {
        "count": f"a whole number of at least {argument.minimum}",
        "probability": "a number from 0 to 1",
        "sizes": f"a list of two whole numbers of at least {argument.minimum}",
        "flag": "True or False",
    }[argument.kind]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["GRAPH_PRIORS", "GraphPriorArgument", "check_graph_prior", "num_tree_nodes", "resolve_graph_prior_kwargs"]
