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
"""Losses on the graph of a NAC as pure functions of signatures or link probabilities. They return a scalar."""

from typing import Literal

import torch

from m2mkd.modeling.graph_priors import cosine_distance


TruncationType = Literal["direct", "masked"]


def link_probability(
    signatures_u: torch.Tensor,
    signatures_v: torch.Tensor,
    bandwidth: torch.Tensor | float,
    truncation: float | None = None,
    truncation_type: TruncationType = "direct",
) -> torch.Tensor:
    r"""
    Probability that two latents are linked: `exp(-d_uv / bandwidth)` with the cosine distance `d_uv` of their
    signatures, and 0 beyond `truncation` (NAC, arXiv 2210.08031, section 2).

    Args:
        signatures_u (`torch.Tensor` of shape `(n, signature_size)`)
        signatures_v (`torch.Tensor` of shape `(m, signature_size)`)
        bandwidth (`float` or `torch.Tensor` of shape `()`): Positive, in units of the distance.
        truncation (`float`, *optional*): The largest distance of a link; `None` for no limit.
        truncation_type (`str`): `"direct"` keeps `d <= truncation` and passes no gradient through the pairs that are
            cut (the official straight-through estimator has the same effect).
            `"masked"` keeps `d < truncation` and passes the gradient as if nothing had been cut.

    Returns:
        `torch.Tensor` of shape `(n, m)`.

    Raises:
        `ValueError`: `truncation_type` is unknown.
    """
    if truncation_type not in ("direct", "masked"):
        raise ValueError(f'`truncation_type` must be "direct" or "masked", but is {truncation_type!r}.')
    distance = cosine_distance(signatures_u, signatures_v)
    probability = torch.exp(-distance / bandwidth)
    if truncation is None:
        return probability
    if truncation_type == "direct":
        return torch.where(distance <= truncation, probability, 0.0)
    cut = torch.where(distance < truncation, 0.0, probability.detach())
    return probability - cut


def signature_repulsion_loss(
    signatures: torch.Tensor, hinge: float, reduction: Literal["sum", "mean"] = "sum"
) -> torch.Tensor:
    r"""
    Loss that pushes apart signatures that are too close: `-sum d_uv` over the pairs `u < v` with a cosine distance
    `d_uv < hinge`. Without such pairs, the loss and its gradient are 0.

    Args:
        signatures (`torch.Tensor` of shape `(n, signature_size)`): Signatures of the input, mediator and output
            latents together.
        hinge (`float`): The distance at and above which a pair does not count.
        reduction (`str`): `"sum"` or `"mean"` over the close pairs.

    Raises:
        `ValueError`: `reduction` is unknown.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f'`reduction` must be "sum" or "mean", but is {reduction!r}.')
    distance = cosine_distance(signatures, signatures)
    # a mask instead of a selection, so that the compiler knows the shapes and nothing waits for the device
    close = (distance < hinge).tril(diagonal=-1)
    total = torch.where(close, distance, 0.0).sum()
    return -total if reduction == "sum" else -total / close.sum().clamp(min=1)


def block_model_graphon(num_latents: int, num_clusters: int, p_in: float, p_out: float) -> torch.Tensor:
    """
    Link probabilities of a stochastic block model with clusters of equal size.

    Args:
        num_latents (`int`): Number of latents.
        num_clusters (`int`): Number of clusters; each consists of consecutive latents.
        p_in (`float`): Probability of a link within a cluster.
        p_out (`float`): Probability of a link between two clusters.

    Returns:
        `torch.Tensor` of shape `(num_latents, num_latents)`.

    Raises:
        `ValueError`: `num_latents` is not a multiple of `num_clusters`, or `p_in` or `p_out` is not a probability.
    """
    if num_clusters < 1 or num_latents < 1 or num_latents % num_clusters:
        raise ValueError(
            f"`num_latents` must be a positive multiple of `num_clusters`, but is {num_latents} with `num_clusters` "
            f"{num_clusters}. Change one of them so that all clusters have the same size."
        )
    for field, probability in (("p_in", p_in), ("p_out", p_out)):
        if not 0 <= probability <= 1:
            raise ValueError(f"`{field}` must be a probability, from 0 to 1, but is {probability}.")
    cluster = torch.arange(num_latents) // (num_latents // num_clusters)
    return torch.where(cluster[:, None] == cluster, float(p_in), float(p_out))


def block_model_loss(link_probability: torch.Tensor, graphon: torch.Tensor, clip: float | None = None) -> torch.Tensor:
    r"""
    Loss that pulls the graph towards a stochastic block model: the mean of `max((P_{pi(u)v} - W_uv)^2, clip)` over all
    `(u, v)`, with the permutation `pi` of the rows of `P` that brings them closest to those of `W` (no gradient passes
    through this choice).

    As in the paper's code, only rows are permuted. The loss is therefore 0 only if
    every cluster consists of consecutive latents, as in a planted partition. A graph with the right clusters in
    another order costs as much as a wrong graph. Permuting both rows and columns would be a quadratic assignment
    problem, for which there is no fast exact solver.

    Args:
        link_probability (`torch.Tensor` of shape `(n, n)`): P, from [`link_probability`].
        graphon (`torch.Tensor` of shape `(n, n)`): W, from [`block_model_graphon`].
        clip (`float`, *optional*): Squared errors below `clip` count as `clip` and have no gradient. `None`: no
            clipping.

    Raises:
        `ImportError`: scipy is not installed.
        `ValueError`: the shapes differ.
    """
    if link_probability.shape != graphon.shape:
        raise ValueError(
            f"`link_probability` and `graphon` must have the same shape, but have {tuple(link_probability.shape)} and "
            f"{tuple(graphon.shape)}. Create the graphon for the same number of latents."
        )
    graphon = graphon.to(link_probability)
    squared_error = (link_probability[_closest_rows(link_probability, graphon)] - graphon) ** 2
    return (squared_error.clamp(min=clip) if clip else squared_error).mean()


@torch.no_grad()
def _closest_rows(matrix: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Indices `pi` that minimize `sum_u |matrix[pi(u)] - target[u]|^2`."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError(
            "The block model loss matches rows with `scipy.optimize.linear_sum_assignment`, but scipy is not "
            "installed. Run `pip install scipy`, or give the loss no weight."
        ) from error

    # the squares are the same for every permutation, so only the inner products matter
    overlap = target.cpu().double() @ matrix.cpu().double().T
    _, rows = linear_sum_assignment(overlap.numpy(), maximize=True)
    return torch.from_numpy(rows).to(matrix.device)


__all__ = [
    "TruncationType",
    "block_model_graphon",
    "block_model_loss",
    "link_probability",
    "signature_repulsion_loss",
]
