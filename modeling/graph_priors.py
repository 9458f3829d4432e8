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
"""
Graph priors of a NAC: a graph over the mediator latents, and signatures whose cosine distances reproduce it.

They are needed only for a new NAC, because a loaded model already has its signatures.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from transformers import initialization as init
from transformers.utils import logging

from m2mkd.configuration.graph_prior_rules import check_graph_prior, num_tree_nodes, resolve_graph_prior_kwargs


if TYPE_CHECKING:
    import networkx


SignatureLoss = Literal["hinge", "mse"]


def make_graph(name: str, num_latents: int, kwargs: Mapping[str, Any], seed: int) -> "networkx.Graph":
    """
    Draw a graph prior.

    Args:
        name (`str`): A key of [`~configuration.graph_prior_rules.GRAPH_PRIORS`].
        num_latents (`int`): Number of nodes.
        kwargs (`Mapping`): The arguments of the prior, named as in networkx.
        seed (`int`): Seed for networkx. The graph is the same as that of the official code after `random.seed(seed)`.

    Returns:
        `networkx.Graph` over the nodes `0 … num_latents - 1`, in the order in which networkx created them.

    Raises:
        `ValueError`: see [`~configuration.graph_prior_rules.check_graph_prior`].
    """
    import networkx

    check_graph_prior(name, kwargs, num_latents)
    kwargs = resolve_graph_prior_kwargs(name, kwargs, num_latents)
    match name:
        case "barabasi_albert":
            graph = networkx.barabasi_albert_graph(num_latents, **kwargs, seed=seed)
        case "planted_partition":
            graph = networkx.planted_partition_graph(**kwargs, seed=seed)
        case "ring_of_cliques":
            graph = networkx.ring_of_cliques(**kwargs)
        case "erdos_renyi":
            graph = networkx.erdos_renyi_graph(num_latents, **kwargs, seed=seed)
        case "watts_strogatz":
            graph = networkx.watts_strogatz_graph(num_latents, **kwargs, seed=seed)
        case "grid":
            graph = networkx.grid_graph(**kwargs)
        case "balanced_tree":
            graph = networkx.balanced_tree(**kwargs)
            if num_tree_nodes(**kwargs) < num_latents:
                graph.add_edge(num_latents - 2, num_latents - 1)
        case "barbell":
            graph = networkx.barbell_graph(**kwargs)
        case "hypercube":
            graph = networkx.hypercube_graph(num_latents.bit_length() - 1)
        case "complete":
            graph = networkx.complete_graph(num_latents)
        case _:
            raise ValueError("`graph_prior` is None: there is no graph to draw.")
    return networkx.convert_node_labels_to_integers(graph)


def adjacency_matrix(graph: "networkx.Graph") -> torch.Tensor:
    """Float32 tensor of shape `(n, n)` on the CPU: 1 where two of the nodes `0 … n - 1` are linked, 0 elsewhere."""
    num_nodes = graph.number_of_nodes()
    adjacency = torch.zeros(num_nodes, num_nodes, dtype=torch.float32, device="cpu")
    if graph.number_of_edges():
        ends = torch.tensor(list(graph.edges), device="cpu").T
        adjacency[ends[0], ends[1]] = 1.0
        adjacency[ends[1], ends[0]] = 1.0
    return adjacency


def cosine_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    r"""
    Distance between the signatures of two sets of latents, from 0 (same direction) to 2 (opposite):
    `d_uv = 1 - <a_u, b_v> / (|a_u| |b_v|)` (NAC, arXiv 2210.08031, section 2).

    Under autocast it is still computed in the dtype of its arguments, because the rounding of bfloat16 would add and
    remove links.

    Args:
        a (`torch.Tensor` of shape `(n, signature_size)`)
        b (`torch.Tensor` of shape `(m, signature_size)`)

    Returns:
        `torch.Tensor` of shape `(n, m)`.
    """
    with torch.autocast("cpu" if a.is_meta else a.device.type, enabled=False):
        return 1.0 - F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(-1, -2)


@torch.no_grad()
def fit_signatures(
    adjacency: torch.Tensor,
    signature_size: int,
    truncation: float,
    *,
    loss: SignatureLoss = "hinge",
    num_steps: int = 1000,
    learning_rate: float = 1e-3,
    initial: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[torch.Tensor, float]:
    r"""
    Fit signatures that reproduce a graph when their cosine distances `d` are cut at `truncation`. Adam runs in float32
    on the CPU, regardless of the default device, and does not use the global random state.

    The losses are means over all `(u, v)`:

    - `"hinge"`: `max(d_uv, truncation)` where `u` and `v` are linked, `max(-d_uv, -truncation)` where they are not;
    - `"mse"`: `(d_uv - l_uv / max l)^2` with the lengths `l` of the shortest paths. Two nodes without a path between
      them get the largest length (in the official code, they count as the same node). This loss does not use
      `truncation`.

    Args:
        adjacency (`torch.Tensor` of shape `(n, n)`): 1 where linked, 0 elsewhere; symmetric, 0 on the diagonal.
        signature_size (`int`): Width of a signature.
        truncation (`float`): The distance at and above which there is no link, in (0, 2].
        loss (`str`): `"hinge"` or `"mse"`.
        num_steps (`int`): Number of steps of Adam.
        learning_rate (`float`): Learning rate of Adam.
        initial (`torch.Tensor` of shape `(n, signature_size)`, *optional*): Initial signatures. `None` starts from
            random orthogonal rows (or columns, if there are more latents than dimensions).
        seed (`int`): Seed of the initial signatures.
        progress (`bool`): Whether to show a progress bar with the loss once the fit has taken a second.

    Returns:
        `tuple[torch.Tensor, float]`: signatures of shape `(n, signature_size)`, not normalized, and the adjacency
        error, which is the fraction of wrong entries in the adjacency that they reproduce.

    Raises:
        `ValueError`: a shape or value is invalid, or `"mse"` is used for a graph without edges.
    """
    _check_fit(adjacency, signature_size, truncation, loss, num_steps, initial)
    # otherwise the state of the optimizer would be on the caller's default device
    with torch.device("cpu"), torch.autocast("cpu", enabled=False):
        adjacency = adjacency.to("cpu", torch.float32)
        if initial is None:
            signatures = torch.empty(adjacency.shape[0], signature_size, dtype=torch.float32)
            init.orthogonal_(signatures, generator=torch.Generator().manual_seed(seed))
        else:
            signatures = initial.detach().to("cpu", torch.float32, copy=True)
        target = adjacency if loss == "hinge" else _scaled_path_lengths(adjacency)
        _descend(signatures, target, truncation, loss, num_steps, learning_rate, progress)
        linked = cosine_distance(signatures, signatures).lt(truncation).float()
        # the diagonal is ignored, because a latent is always linked to itself
        error = (linked.fill_diagonal_(0.0) - adjacency).abs().mean().item()
    return signatures, error


def signatures_for(
    name: str,
    num_latents: int,
    kwargs: Mapping[str, Any],
    signature_size: int,
    truncation: float,
    seed: int,
    progress: bool = True,
) -> tuple[torch.Tensor, float]:
    """
    Signatures for a graph prior: [`fit_signatures`] fits them to the graph of [`make_graph`]. For `"complete"` no fit
    is needed: every signature is the first unit vector.

    Args:
        name (`str`), num_latents (`int`), kwargs (`Mapping`): The graph, see [`make_graph`].
        signature_size (`int`): Width of a signature.
        truncation (`float`): The distance at and above which there is no link. The official code always fits at 0.8,
            although its NACs truncate the kernel at 0.9.
        seed (`int`): Seed of the graph and of the initial signatures.
        progress (`bool`): Whether to show a progress bar.

    Returns:
        `tuple[torch.Tensor, float]`: signatures of shape `(num_latents, signature_size)` and the adjacency error.

    Raises:
        `ValueError`: the prior does not match the number of latents, or a value is out of range.
    """
    check_graph_prior(name, kwargs, num_latents)
    if name == "complete":
        signatures = torch.zeros(num_latents, signature_size, dtype=torch.float32, device="cpu")
        signatures[:, 0] = 1.0
        return signatures, 0.0
    adjacency = adjacency_matrix(make_graph(name, num_latents, kwargs, seed))
    return fit_signatures(adjacency, signature_size, truncation, seed=seed, progress=progress)


def _descend(
    signatures: torch.Tensor,
    target: torch.Tensor,
    truncation: float,
    loss: SignatureLoss,
    num_steps: int,
    learning_rate: float,
    progress: bool,
) -> None:
    """
    Run Adam on `signatures`, in place. The gradient is computed in closed form: with the unit vectors `s` and the
    symmetric `G = dL/dd` it is `-2 G s`, minus its component along `s`, divided by the norm of the signature. This
    takes only two matrix products per step.
    """
    optimizer = torch.optim.Adam([signatures], lr=learning_rate)
    one = signatures.new_ones(())
    distance = torch.empty_like(target)
    scaled_sign = (2 * target - 1) / target.numel()
    bar = logging.tqdm(range(num_steps), desc="Fitting signatures", unit="step", delay=1.0, disable=not progress)
    for step in bar:
        norm = signatures.norm(dim=-1, keepdim=True).clamp_(min=1e-12)
        unit = signatures / norm
        torch.addmm(one, unit, unit.T, alpha=-1, out=distance)
        if progress and step % 50 == 0:
            bar.set_postfix(loss=f"{_fit_loss(distance, target, truncation, loss):.6f}", refresh=False)
        if loss == "hinge":
            # one sign for linked pairs that are too far apart, the other for unlinked pairs that are too close, 0 for
            # correct pairs
            distance.sub_(truncation).mul_(scaled_sign).gt_(0).mul_(scaled_sign)
        else:
            distance.sub_(target).mul_(2 / target.numel())
        # `distance` is symmetric, and with its transpose the product uses a faster kernel
        gradient = torch.mm(distance.T, unit).mul_(-2)
        gradient.sub_((gradient * unit).sum(dim=-1, keepdim=True) * unit).div_(norm)
        signatures.grad = gradient
        optimizer.step()
    signatures.grad = None


def _fit_loss(distance: torch.Tensor, target: torch.Tensor, truncation: float, loss: SignatureLoss) -> float:
    if loss == "mse":
        return F.mse_loss(distance, target).item()
    return torch.where(target == 1, distance.clamp(min=truncation), -distance.clamp(max=truncation)).mean().item()


def _scaled_path_lengths(adjacency: torch.Tensor) -> torch.Tensor:
    import networkx

    graph = networkx.Graph()
    graph.add_nodes_from(range(adjacency.shape[0]))
    graph.add_edges_from(adjacency.nonzero().tolist())
    lengths = torch.full_like(adjacency, -1.0)
    for source, targets in networkx.all_pairs_shortest_path_length(graph):
        lengths[source, list(targets)] = torch.tensor(list(targets.values()), dtype=torch.float32)
    longest = lengths.max()
    if longest < 1:
        raise ValueError('`loss="mse"` needs a graph with edges, but `adjacency` has none. Use `loss="hinge"`.')
    return torch.where(lengths < 0, longest, lengths) / longest


def _check_fit(
    adjacency: torch.Tensor,
    signature_size: int,
    truncation: float,
    loss: str,
    num_steps: int,
    initial: torch.Tensor | None,
) -> None:
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"`adjacency` must be a square matrix, but has shape {tuple(adjacency.shape)}.")
    if (
        not (adjacency == adjacency.T).all()
        or adjacency.diagonal().any()
        or not ((adjacency == 0) | (adjacency == 1)).all()
    ):
        raise ValueError(
            "`adjacency` must contain only 0 and 1, and be symmetric with 0 on its diagonal. Use `adjacency_matrix` "
            "to make one."
        )
    if signature_size < 1:
        raise ValueError(f"`signature_size` must be at least 1, but is {signature_size}.")
    if not 0 < truncation <= 2:
        raise ValueError(f"`truncation` is a cosine distance and must be in (0, 2], but is {truncation}.")
    if loss not in ("hinge", "mse"):
        raise ValueError(f'`loss` must be "hinge" or "mse", but is {loss!r}.')
    if num_steps < 0:
        raise ValueError(f"`num_steps` must not be negative, but is {num_steps}.")
    if initial is not None and initial.shape != (adjacency.shape[0], signature_size):
        raise ValueError(
            f"`initial` must have the shape {(adjacency.shape[0], signature_size)} (nodes, `signature_size`), but has "
            f"{tuple(initial.shape)}."
        )


__all__ = [
    "SignatureLoss",
    "adjacency_matrix",
    "cosine_distance",
    "fit_signatures",
    "make_graph",
    "signatures_for",
]
