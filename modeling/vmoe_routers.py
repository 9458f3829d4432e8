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
Routers of a V-MoE: which expert sees which token, and what becomes of the experts' outputs.

All routers take the tokens in groups of shape `(num_groups, group_size, hidden_size)`, which do not see each other.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from m2mkd.configuration.configuration_vmoe import VMoEConfig


class VMoERouter(nn.Module):
    """
    What the routers share: groups of tokens, members of an ensemble, and noise on the logits in training.

    The options are read from the config when they are used, so that `model.set_router` can change them.
    """

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.config = config
        self.num_experts = config.num_experts
        self.num_members = config.num_ensemble_members
        self.noise_std = config.router_noise_std / (config.num_experts // config.num_ensemble_members)

    @property
    def tokens_compete(self) -> bool:
        """Whether what a token gets depends on the other tokens of its group."""
        return True

    def split_into_groups(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """
        Group the tokens. The members of an ensemble are neighbours: image, token, member.

        Args:
            hidden_states (`torch.Tensor` of shape `(batch_size * num_members, num_tokens, hidden_size)`)

        Returns:
            `torch.Tensor` of shape `(num_groups, group_size, hidden_size)`; for one group of all tokens of the batch,
            `(num_tokens, hidden_size)`.

        Raises:
            `ValueError`: the tokens of the batch do not fill their groups.
        """
        size, width = self.config.router_group_size, hidden_states.shape[-1]
        if self.num_members > 1:
            hidden_states = hidden_states.unflatten(0, (-1, self.num_members)).transpose(1, 2).flatten(1, 2)
        if size is None:
            return hidden_states if self.tokens_compete else hidden_states.reshape(-1, width)
        num_tokens = hidden_states.shape[:-1].numel()
        if num_tokens % size:
            raise ValueError(
                f"`router_group_size` is {size}, but the batch has {num_tokens} tokens, which is no multiple of it. "
                "Use another batch size, or another group: `model.set_router(router_group_size=None)` routes each "
                "image alone."
            )
        return hidden_states.reshape(-1, size, width)

    def join_groups(self, outputs: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """Undo [`split_into_groups`]: give `outputs` the shape and order of `hidden_states`."""
        if self.num_members > 1:
            num_tokens, width = hidden_states.shape[1:]
            outputs = outputs.reshape(-1, num_tokens, self.num_members, width).transpose(1, 2)
        return outputs.reshape(hidden_states.shape)

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Compute the logits, with the experts (or slots) in the last dimension."""
        raise NotImplementedError

    def choose(self, noisy_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the weights and the choices."""
        raise NotImplementedError

    def load(self, choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """
        How much each expert was chosen, of shape `(num_experts,)`, by what `forward` has returned: all experts as
        much, where tokens do not choose.
        """
        return torch.ones(self.num_experts, dtype=torch.long, device=choice[0].device)

    def dispatch(
        self,
        experts: nn.Module,
        hidden_states: torch.Tensor,
        choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Send the tokens to the experts and add up what comes back.

        Args:
            hidden_states (`torch.Tensor` of shape `(num_groups, group_size, hidden_size)`)
            choice (`tuple`): What `forward` has returned.

        Returns:
            Outputs with the shape of `hidden_states`, and a mask of what was dropped, if anything can be.
        """
        raise NotImplementedError

    def weights_by_expert(self, noisy_logits: torch.Tensor, dropped_mask: torch.Tensor | None) -> torch.Tensor:
        """
        Weight of each expert's output for each token, of shape `(num_groups, group_size, num_experts)`. It is 0 where
        the expert does not see the token, or has no room for it.

        Args:
            noisy_logits (`torch.Tensor`): Of `forward`.
            dropped_mask (`torch.Tensor`, *optional*): Of `dispatch`.
        """
        raise NotImplementedError

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states (`torch.Tensor` of shape `(num_groups, group_size, hidden_size)`)

        Returns:
            Logits, noisy logits, weights and choices; `choose` of each router says which.
        """
        logits = self.score(hidden_states)
        noisy_logits = logits
        if self.training and self.noise_std > 0:
            noisy_logits = logits + self.noise_std * torch.randn_like(logits)
        weights, index = self.choose(noisy_logits)
        return logits, noisy_logits, weights.to(hidden_states.dtype), index


class VMoELinearRouter(VMoERouter):
    """Linear gate. In an ensemble each token sees only the experts of its member, so the logits are those."""

    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))
        self.bias = nn.Parameter(torch.empty(config.num_experts)) if config.router_bias else None

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(num_groups, group_size, num_experts / num_members)`."""
        logits = F.linear(hidden_states, self.weight, self.bias)
        if self.num_members > 1:
            blocks = logits.unflatten(-1, (self.num_members, -1)).unflatten(-3, (-1, self.num_members))
            logits = blocks.diagonal(dim1=-3, dim2=-2).transpose(-1, -2).flatten(-3, -2)
        return logits

    def capacity(self, num_tokens: int) -> int:
        """Room of one expert for `num_tokens` tokens that are to be shared out."""
        if self.config.expert_capacity is not None:
            return self.config.expert_capacity
        return compute_capacity(
            num_tokens,
            self.num_experts,
            self.config.capacity_factor,
            self.config.capacity_rounding,
            self.config.capacity_multiple_of,
        )


class VMoETokenChoiceRouter(VMoELinearRouter):
    """
    Each token chooses the `num_experts_per_tok` experts with the largest logits; they are weighted by the softmax over
    these logits, or over all logits (V-MoE paper, equation 1).
    """

    @property
    def tokens_compete(self) -> bool:
        """Only for a limited room."""
        return self.config.has_capacity

    def choose(self, noisy_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weights and indices of the chosen experts, both of shape `(num_groups, group_size, num_experts_per_tok)`. Of
        equal experts the one with the lower index is chosen.
        """
        gates = F.softmax(noisy_logits, dim=-1, dtype=torch.float32)
        left, chosen = gates.detach(), []
        for _ in range(self.config.num_experts_per_tok):
            chosen.append(left.argmax(dim=-1, keepdim=True))
            left = left.scatter(-1, chosen[-1], -1.0)
        index = torch.cat(chosen, dim=-1)
        # CODEPATH: Google's V-MoE checkpoints use the softmax over all experts, m2mKD's over the selected ones
        if self.config.norm_topk_prob:
            weights = F.softmax(noisy_logits.gather(-1, index), dim=-1, dtype=torch.float32)
        else:
            weights = gates.gather(-1, index)
        if self.num_members > 1:
            member = torch.arange(index.shape[-2], device=index.device) % self.num_members
            index = index + (member * noisy_logits.shape[-1])[:, None]
        return weights, index

    def weights_by_expert(self, noisy_logits: torch.Tensor, dropped_mask: torch.Tensor | None) -> torch.Tensor:
        """The softmax of each token's choices; 0 for the others and for what is dropped."""
        weights, index = self.choose(noisy_logits)
        if dropped_mask is not None:
            weights = weights.masked_fill(dropped_mask, 0)
        return weights.new_zeros(*weights.shape[:-1], self.num_experts).scatter(-1, index, weights)

    def load(self, choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Number of choices of each expert, also of those that are dropped."""
        return torch.bincount(choice[3].flatten(), minlength=self.num_experts)

    def positions(self, index: torch.Tensor, noisy_logits: torch.Tensor) -> torch.Tensor:
        """
        Number of earlier claims on the same expert, with the shape of `index`: first choices come before second ones,
        and among equal ranks earlier tokens, or with batch prioritized routing those with a larger first weight.
        """
        # CODEPATH: Google's V-MoE checkpoints were trained without priorities; many are used with them
        if self.config.batch_prioritized_routing:
            order = order_by(F.softmax(noisy_logits, dim=-1, dtype=torch.float32).amax(dim=-1))
            order, back = (way[..., None].expand_as(index) for way in (order, order.argsort(dim=-1)))
            return self._claims_before(index.gather(-2, order)).gather(-2, back)
        return self._claims_before(index)

    def _claims_before(self, index: torch.Tensor) -> torch.Tensor:
        claims = index.transpose(-1, -2).flatten(-2)[..., None]
        counts = (claims == torch.arange(self.num_experts, device=index.device)).long().cumsum(dim=-2)
        return (counts.gather(-1, claims) - 1).reshape(index.transpose(-1, -2).shape).transpose(-1, -2)

    def dispatch(
        self,
        experts: nn.Module,
        hidden_states: torch.Tensor,
        choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the experts. The mask of dropped choices has the shape of the indices; `None` without a capacity."""
        _, noisy_logits, weights, index = choice
        if not self.config.has_capacity:
            flat = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden_states, index, weights))
            return experts(*flat).view_as(hidden_states), None
        group_size, num_choices = index.shape[1:]
        # a token claims an expert once, so more room than tokens stays empty
        capacity = min(self.capacity(group_size * num_choices), group_size)
        position = self.positions(index, noisy_logits)
        kept = position < capacity
        # the row of each choice among the experts' rows; what is dropped goes to one row behind them
        rows = torch.where(kept, index * capacity + position, self.num_experts * capacity).flatten(1)
        tokens = torch.arange(group_size, device=rows.device).repeat_interleave(num_choices).expand_as(rows)
        # rows that nobody claims hold the first token; no choice reads them
        token_of_row = rows.new_zeros(rows.shape[0], self.num_experts * capacity + 1).scatter(1, rows, tokens)
        outputs = experts.forward_rows(take_rows(hidden_states, token_of_row[:, :-1]))
        outputs = take_rows(outputs, rows * kept.flatten(1)).unflatten(1, (group_size, num_choices))
        return (outputs * (weights * kept)[..., None]).sum(dim=-2), ~kept


class VMoEExpertChoiceRouter(VMoELinearRouter):
    """Each expert takes the tokens of the group that have the largest weights for it (arXiv 2202.09368)."""

    def choose(self, noisy_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weights (softmax over the experts) and indices of the tokens of each expert, both of shape `(num_groups,
        num_experts, capacity)`. Of equal tokens the earlier one is taken.

        Raises:
            `ValueError`: an expert has more room than the group has tokens.
        """
        gates = F.softmax(noisy_logits, dim=-1, dtype=torch.float32).transpose(-1, -2)
        group_size = gates.shape[-1]
        capacity = self.capacity(group_size)
        if capacity > group_size:
            raise ValueError(
                f"Each expert would take {capacity} tokens, but a group has only {group_size}. Lower "
                f"`capacity_factor` {self.config.capacity_factor}, `expert_capacity` {self.config.expert_capacity} or "
                f"`capacity_multiple_of` {self.config.capacity_multiple_of}, or raise `router_group_size`."
            )
        index = order_by(gates.detach())[..., :capacity]
        return gates.gather(-1, index), index

    def weights_by_expert(self, noisy_logits: torch.Tensor, dropped_mask: torch.Tensor | None) -> torch.Tensor:
        """The softmax over the experts, where the expert has taken the token."""
        weights, index = self.choose(noisy_logits)
        taken = weights.new_zeros(noisy_logits.transpose(-1, -2).shape)
        return taken.scatter(-1, index, weights).transpose(-1, -2)

    def dispatch(
        self,
        experts: nn.Module,
        hidden_states: torch.Tensor,
        choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the experts. The mask, of shape `(num_groups, group_size)`, says which tokens no expert has taken."""
        _, _, weights, index = choice
        index = index.flatten(1)
        outputs = experts.forward_rows(take_rows(hidden_states, index)) * weights.flatten(1)[..., None]
        taken = index.new_zeros(hidden_states.shape[:-1]).scatter(1, index, torch.ones_like(index))
        return add_rows(hidden_states.shape, index, outputs), taken == 0


class VMoESoftRouter(VMoERouter):
    """
    Each expert gets `num_slots` weighted means of all tokens of the group, and each token a weighted mean of the
    outputs of all slots (arXiv 2308.00951, algorithm 1). No token is dropped.
    """

    def __init__(self, config: VMoEConfig):
        super().__init__(config)
        self.noise_std = config.router_noise_std
        self.mu = nn.Parameter(torch.empty(config.num_experts, config.num_slots, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(()))

    def score(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Logits of shape `(num_groups, group_size, num_experts * num_slots)`: scaled cosines of tokens and slots."""
        return F.linear(unit(hidden_states) * self.scale, unit(self.mu).flatten(0, 1))

    def choose(self, noisy_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights of the slots for each token (combine), and of the tokens for each slot (dispatch)."""
        combine, dispatch = (F.softmax(noisy_logits, dim=dim, dtype=torch.float32) for dim in (-1, -2))
        return combine, dispatch

    def weights_by_expert(self, noisy_logits: torch.Tensor, dropped_mask: torch.Tensor | None) -> torch.Tensor:
        """The sum of the combine weights of an expert's slots."""
        combine, _ = self.choose(noisy_logits)
        return combine.unflatten(-1, (self.num_experts, -1)).sum(dim=-1)

    def dispatch(
        self,
        experts: nn.Module,
        hidden_states: torch.Tensor,
        choice: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, None]:
        """Run the experts."""
        _, _, combine, dispatch = choice
        slots = dispatch.transpose(-1, -2).to(hidden_states.dtype) @ hidden_states
        return combine @ experts.forward_rows(slots), None


ROUTERS = {
    "token_choice": VMoETokenChoiceRouter,
    "expert_choice": VMoEExpertChoiceRouter,
    "soft": VMoESoftRouter,
}


def compute_capacity(
    num_tokens: int, num_experts: int, capacity_factor: float, rounding: str, multiple_of: int | None
) -> int:
    """
    Number of tokens for which one expert has room: `num_tokens * capacity_factor / num_experts`, made whole by
    `rounding` (`"ceil"` or `"round"`, to even) and raised to a multiple of `multiple_of` (V-MoE paper, section 2.3,
    and its code).

    Raises:
        `ValueError`: there is no room at all.
    """
    room = num_tokens * capacity_factor / num_experts
    capacity = math.ceil(room) if rounding == "ceil" else round(room)
    if capacity < 1:
        raise ValueError(
            f"`capacity_factor` {capacity_factor} leaves each of {num_experts} experts no room for {num_tokens} "
            f"tokens (`capacity_rounding` '{rounding}'). Raise it, or set `capacity_rounding` to 'ceil'."
        )
    return capacity + -capacity % multiple_of if multiple_of else capacity


def order_by(values: torch.Tensor) -> torch.Tensor:
    """Indices of the last dimension from the largest value to the smallest; equal values keep their order."""
    # ONNX has no stable sort, but its TopK keeps the order
    if torch.onnx.is_in_onnx_export():
        return values.topk(values.shape[-1], dim=-1).indices
    return values.argsort(dim=-1, descending=True, stable=True)


def take_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Rows `(num_groups, num_taken, width)` of `(num_groups, num_rows, width)`, by `index` in each group."""
    taken = rows.flatten(0, 1).index_select(0, _across_groups(index, rows.shape[1]))
    return taken.view(*index.shape, rows.shape[-1])


def add_rows(shape: torch.Size, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The reverse of [`take_rows`]: zeros of `shape`, to whose rows `values` are added."""
    values = values.flatten(0, 1)
    index = _across_groups(index, shape[1])[:, None].expand_as(values)
    return values.new_zeros(shape).flatten(0, 1).scatter_add(0, index, values).view(shape)


def _across_groups(index: torch.Tensor, group_size: int) -> torch.Tensor:
    return (index + torch.arange(index.shape[0], device=index.device)[:, None] * group_size).flatten()


def unit(vectors: torch.Tensor) -> torch.Tensor:
    """Vectors of length 1."""
    return vectors * torch.rsqrt(vectors.square().sum(dim=-1, keepdim=True) + 1e-6)
