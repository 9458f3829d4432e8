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
"""Experts of any width with the grouped matrix product, whose rows must be multiples of 16 bytes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.moe import ExpertsInterface


class PaddedExperts:
    """
    View of experts whose weight rows are padded with zeros to multiples of 16 bytes, which torch's grouped matrix
    product requires. All other attributes are those of the experts.
    """

    def __init__(self, experts: Any, size_padding: int, intermediate_padding: int):
        self.experts = experts
        self.up_proj = F.pad(experts.up_proj, (0, size_padding, 0, intermediate_padding))
        self.up_proj_bias = F.pad(experts.up_proj_bias, (0, intermediate_padding))
        self.down_proj = F.pad(experts.down_proj, (0, intermediate_padding, 0, size_padding))
        self.down_proj_bias = F.pad(experts.down_proj_bias, (0, size_padding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.experts, name)


class AnyWidthExpertsInterface(ExpertsInterface):
    """The backends of transformers, with `"grouped_mm"` for any width."""

    def get_interface(self, experts_implementation: str, default: Callable) -> Callable:
        """
        The function of a backend; `default` for `"eager"`, and for `"grouped_mm"` while the model is exported: an
        exported grouped product is an operator of transformers, which ONNX and a process with torch only do not know.
        """
        experts_forward = super().get_interface(experts_implementation, default)
        if experts_implementation != "grouped_mm":
            return experts_forward
        is_exported = torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()
        return default if is_exported else partial(padded_forward, experts_forward)


def padded_forward(
    experts_forward: Callable,
    experts: Any,
    hidden_states: torch.Tensor,
    top_k_index: torch.Tensor,
    top_k_weights: torch.Tensor,
) -> torch.Tensor:
    """Call `experts_forward` with rows of multiples of 16 bytes; the other arguments are those of any backend."""
    size, intermediate_size = hidden_states.shape[-1], experts.up_proj.shape[-2]
    alignment = 16 // experts.up_proj.element_size()
    size_padding, intermediate_padding = -size % alignment, -intermediate_size % alignment
    if size_padding == 0 and intermediate_padding == 0:
        return experts_forward(experts, hidden_states, top_k_index, top_k_weights)
    padded = PaddedExperts(experts, size_padding, intermediate_padding)
    return experts_forward(padded, F.pad(hidden_states, (0, size_padding)), top_k_index, top_k_weights)[..., :size]
