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
"""Stitch layers, which map hidden states from the width of one network to the width of another."""

import torch
from torch import nn


class StitchLayer(nn.Module):
    """
    LayerNorm and Linear from `in_features` to `out_features` (m2mKD, section 3.2: the form for V-MoE), or only Linear
    (the form for NAC).

    Args:
        in_features (`int`): Width of the input hidden states.
        out_features (`int`): Width of the output hidden states.
        normalize (`bool`, *optional*, defaults to `True`): Whether a LayerNorm precedes the Linear.
    """

    def __init__(self, in_features: int, out_features: int, normalize: bool = True):
        super().__init__()
        # 1e-5 as in the official code, independent of the epsilon of the networks on either side
        self.layernorm = nn.LayerNorm(in_features, eps=1e-5) if normalize else nn.Identity()
        self.linear = nn.Linear(in_features, out_features)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Re-initialize the weights as in the official code: truncated normal with std 0.02, and bias 0."""
        nn.init.trunc_normal_(self.linear.weight, std=0.02)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map `(batch_size, num_tokens, in_features)` to `(batch_size, num_tokens, out_features)`."""
        return self.linear(self.layernorm(hidden_states))


__all__ = ["StitchLayer"]
