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
"""Patch and position embeddings of a V-MoE."""

import torch
import torch.nn.functional as F
from torch import nn

from m2mkd.configuration.configuration_vmoe import VMoEConfig


class VMoEPatchEmbeddings(nn.Module):
    """Patch embedding from `(batch_size, num_channels, height, width)` to `(batch_size, num_patches, hidden_size)`."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        image_size, patch_size = config.image_size, config.patch_size
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.patch_size = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
        self.grid_size = (self.image_size[0] // self.patch_size[0], self.image_size[1] // self.patch_size[1])
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.num_channels = config.num_channels
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=self.patch_size, stride=self.patch_size
        )

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        if pixel_values.shape[1] != self.num_channels:
            raise ValueError(
                f"`pixel_values` have {pixel_values.shape[1]} channels, but the model's `num_channels` is "
                f"{self.num_channels}."
            )
        return self.projection(pixel_values.to(self.projection.weight.dtype)).flatten(2).transpose(1, 2)


class VMoEEmbeddings(nn.Module):
    """Class token, if any, patches and position embeddings: `(batch_size, num_patches + 1, hidden_size)`."""

    def __init__(self, config: VMoEConfig):
        super().__init__()
        self.patch_embeddings = VMoEPatchEmbeddings(config)
        self.num_special_tokens = config.num_special_tokens
        num_tokens = self.num_special_tokens + self.patch_embeddings.num_patches
        # CODEPATH: Soft MoE's and V-MoE's checkpoints with a "gap" or "map" head have no class token
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.hidden_size)) if self.num_special_tokens else None
        # CODEPATH: some configurations of google-research/vmoe have fixed embeddings, which are no parameters
        is_learned = config.position_embedding_type == "learned"
        self.position_embeddings = nn.Parameter(torch.empty(1, num_tokens, config.hidden_size)) if is_learned else None
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """
        Position embeddings for an image of `height` x `width` pixels: by bicubic interpolation of the grid, unless
        they are fixed.
        """
        patch_height, patch_width = self.patch_embeddings.patch_size
        grid_height, grid_width = self.patch_embeddings.grid_size
        new_grid = (height // patch_height, width // patch_width)
        if self.position_embeddings is None:
            return self._fixed_positions(*new_grid)
        if not torch.jit.is_tracing() and new_grid == (grid_height, grid_width):
            return self.position_embeddings
        special = self.num_special_tokens
        cls_position, grid = self.position_embeddings[:, :special], self.position_embeddings[:, special:]
        grid = grid.reshape(1, grid_height, grid_width, -1).permute(0, 3, 1, 2)
        # in float32, because bicubic resampling in half precision shifts the embeddings
        grid = F.interpolate(grid.float(), size=new_grid, mode="bicubic", align_corners=False).to(cls_position.dtype)
        return torch.cat((cls_position, grid.flatten(2).transpose(1, 2)), dim=1)

    def _fixed_positions(self, grid_height: int, grid_width: int) -> torch.Tensor:
        weight = self.patch_embeddings.projection.weight
        positions = sincos2d(grid_height, grid_width, weight.shape[0], weight.device)
        return F.pad(positions, (0, 0, self.num_special_tokens, 0)).to(weight.dtype)[None]

    def forward(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool | None = None) -> torch.Tensor:
        height, width = pixel_values.shape[-2:]
        hidden_states = self.patch_embeddings(pixel_values)
        if self.cls_token is not None:
            hidden_states = torch.cat((self.cls_token.expand(hidden_states.shape[0], -1, -1), hidden_states), dim=1)
        if interpolate_pos_encoding:
            return self.dropout(hidden_states + self.interpolate_pos_encoding(height, width))
        if (height, width) != self.patch_embeddings.image_size:
            raise ValueError(
                f"The images are {height}x{width} pixels, but the model's `image_size` is "
                f"{self.patch_embeddings.image_size[0]}x{self.patch_embeddings.image_size[1]}. Resize them, or pass "
                "`interpolate_pos_encoding=True`."
            )
        if self.position_embeddings is None:
            return self.dropout(hidden_states + self._fixed_positions(*self.patch_embeddings.grid_size))
        return self.dropout(hidden_states + self.position_embeddings)


def sincos2d(grid_height: int, grid_width: int, width: int, device: torch.device) -> torch.Tensor:
    """
    Fixed position embeddings of shape `(grid_height * grid_width, width)`: sines and cosines of the column `x` and the
    row `y` at `width / 4` frequencies from 1 to 1/10000 (big_vision, arXiv 2205.01580).
    """
    frequencies = 10000.0 ** -torch.linspace(0, 1, width // 4, device=device)
    row = torch.arange(grid_height, device=device)[:, None, None] * frequencies
    column = torch.arange(grid_width, device=device)[None, :, None] * frequencies
    row, column = torch.broadcast_tensors(row, column)
    return torch.cat((column.sin(), column.cos(), row.sin(), row.cos()), dim=-1).flatten(0, 1)
