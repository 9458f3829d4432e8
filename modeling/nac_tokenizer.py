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
"""Image tokenizer of a Neural Attentive Circuit: ConvNeXt stages and a positional grid."""

import torch
import torch.nn.functional as F
from torch import nn

from m2mkd.configuration.configuration_nac import NACConfig


class NACTokenizerLinear(nn.Linear):
    """A linear layer of the tokenizer, initialized as in ConvNeXt."""


class NACTokenizerBlock(nn.Module):
    """ConvNeXt block on `(batch_size, height, width, channels)`: depthwise convolution and per-pixel perceptron."""

    def __init__(self, config: NACConfig, channels: int):
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel_size=7, padding=3, groups=channels)
        self.layernorm = nn.LayerNorm(channels, eps=1e-6)
        self.fc1 = NACTokenizerLinear(channels, 4 * channels)
        self.fc2 = NACTokenizerLinear(4 * channels, channels)
        self.activation_fn = nn.GELU()
        self.layer_scale = nn.Parameter(torch.empty(channels))
        self.layer_scale_init_value = config.tokenizer_layer_scale_init_value

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        hidden = self.depthwise(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        hidden = self.fc2(self.activation_fn(self.fc1(self.layernorm(hidden))))
        return features + self.layer_scale * hidden


class NACTokenizerStage(nn.Module):
    """One resolution of the tokenizer: a strided convolution with a layer norm, then ConvNeXt blocks."""

    def __init__(self, config: NACConfig, stage_idx: int):
        super().__init__()
        self.is_stem = stage_idx == 0
        channels = config.tokenizer_hidden_sizes[stage_idx]
        in_channels = config.num_channels if self.is_stem else config.tokenizer_hidden_sizes[stage_idx - 1]
        stride = 4 if self.is_stem else 2
        # the stem normalizes its output, the other stages their input
        self.layernorm = nn.LayerNorm(channels if self.is_stem else in_channels, eps=1e-6)
        self.projection = nn.Conv2d(in_channels, channels, kernel_size=stride, stride=stride)
        self.blocks = nn.ModuleList(
            [NACTokenizerBlock(config, channels) for _ in range(config.tokenizer_depths[stage_idx])]
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        if not self.is_stem:
            features = self.layernorm(features)
        features = self.projection(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        if self.is_stem:
            features = self.layernorm(features)
        for block in self.blocks:
            features = block(features)
        return features


class NACImageTokenizer(nn.Module):
    """ConvNeXt stages and a learned positional grid, which give tokens `(batch_size, num_tokens, token_size)`."""

    def __init__(self, config: NACConfig):
        super().__init__()
        self.num_channels = config.num_channels
        self.token_stride = config.token_stride
        image_size = config.image_size
        height, width = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.grid_size = (height // self.token_stride, width // self.token_stride)
        self.stages = nn.ModuleList([NACTokenizerStage(config, i) for i in range(len(config.tokenizer_depths))])
        self.position_embeddings = None
        if config.position_embedding_size > 0:
            self.position_embeddings = nn.Parameter(torch.empty(1, config.position_embedding_size, *self.grid_size))

    def interpolate_pos_encoding(self, height: int, width: int) -> torch.Tensor:
        """The positional grid for `height` x `width` tokens, by bicubic interpolation."""
        grid = self.position_embeddings
        if not torch.jit.is_tracing() and (height, width) == self.grid_size:
            return grid
        # in float32, because bicubic resampling in half precision shifts the embeddings
        return F.interpolate(grid.float(), size=(height, width), mode="bicubic", align_corners=False).to(grid.dtype)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        channels, height, width = pixel_values.shape[1:]
        if channels != self.num_channels or min(height, width) < self.token_stride:
            raise ValueError(
                f"`pixel_values` have {channels} channels and {height}x{width} pixels, but the model's `num_channels` "
                f"is {self.num_channels} and one token covers {self.token_stride}x{self.token_stride} pixels."
            )
        features = pixel_values.to(self.stages[0].projection.weight.dtype).permute(0, 2, 3, 1)
        for stage in self.stages:
            features = stage(features)
        if self.position_embeddings is not None:
            grid = self.interpolate_pos_encoding(*features.shape[1:3]).permute(0, 2, 3, 1)
            features = torch.cat((features, grid.expand(features.shape[0], -1, -1, -1).to(features.dtype)), dim=-1)
        return features.flatten(1, 2)
