"""A residual block whose hidden channels are computed group by group, as a gate decides for each image.

Source: LAUDNet's channel mode, arXiv 2308.15949; see `ChannelUnit` for where the mask lies and why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.ops import ACTIVATIONS, ConvSpec


class ChannelBlock(MaskedBlock):
    """`y = act(shortcut(x) + branch(x))`, every hidden map of the branch multiplied by the channel mask.

    The gate's mask is [N, G, 1, 1]: hidden channels in G groups of neighbours. In `train()` all channels are computed
    and multiplied; in `eval()` images with the same decision share convolutions from which closed channels were cut.
    """

    def channel_mask(self, mask: Tensor) -> Tensor:
        """[N, G, 1, 1] -> [N, W, 1, 1] for W hidden channels."""
        return mask.repeat_interleave(hidden_channels(self.convs) // mask.shape[1], 1)

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        """The block with a decision [N, G, 1, 1] that was made already."""
        if self.training or self.backend == "eager" or torch.compiler.is_compiling():
            return self.dense_forward(x, mask)
        runtime = self._prepared()
        if any(norm.training for norm in runtime.norms):
            return self.dense_forward(x, mask)
        convs = self._fold()[0] if torch.is_grad_enabled() else runtime.branch.convs
        return self._joined(x, self._open_channels(x, mask, convs), {})

    def dense_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The definition: every channel, times the mask behind each hidden activation, plus the shortcut."""
        hidden, steps = x, self.anatomy.steps
        channels = self.channel_mask(mask)
        for i, step in enumerate(steps):
            for path in (step.conv, step.norm, step.act):
                if path is not None:
                    hidden = self.inner.get_submodule(path)(hidden)
            if i < len(steps) - 1:
                hidden = channels.to(hidden.dtype) * hidden
        return self._joined(x, hidden, {})

    def _open_channels(self, x: Tensor, mask: Tensor, convs: Sequence[ConvSpec]) -> Tensor:
        """The branch, with only the open channels of each image computed."""
        patterns, which = torch.unique(mask.detach().flatten(1) > 0.5, dim=0, return_inverse=True)
        width = hidden_channels(self.convs) // patterns.shape[1]
        if len(patterns) == 1:
            return _narrow_branch(x, convs, _open(patterns[0], width))
        parts, places = [], []
        for i, pattern in enumerate(patterns):
            images = (which == i).nonzero().flatten()
            parts.append(_narrow_branch(x.index_select(0, images), convs, _open(pattern, width)))
            places.append(images)
        return torch.cat(parts).index_select(0, torch.cat(places).argsort())


def _open(pattern: Tensor, width: int) -> Tensor | None:
    """Indices of the open channels; None when all are."""
    return None if bool(pattern.all()) else pattern.repeat_interleave(width).nonzero().flatten()


def _narrow_branch(x: Tensor, convs: Sequence[ConvSpec], open_: Tensor | None) -> Tensor:
    """Convolutions with closed hidden channels cut out of their weights; `open_` are the others' indices."""
    for i, conv in enumerate(convs):
        weight, bias, groups = conv.weight, conv.bias, conv.groups
        if open_ is not None:
            if i < len(convs) - 1:
                weight = weight.index_select(0, open_)
                bias = None if bias is None else bias.index_select(0, open_)
            if groups > 1:
                groups = open_.numel() * conv.groups // conv.weight.shape[0]
                x = x.index_select(1, open_) if i == 0 else x
            elif i > 0:
                weight = weight.index_select(1, open_)
        if weight.numel() == 0:
            x = _without_inputs(x, conv, weight, bias)
        else:
            x = F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, groups)
        x = ACTIVATIONS[conv.activation](x)
    return x


def _without_inputs(x: Tensor, conv: ConvSpec, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What a convolution without any channel gives: its bias at every position."""
    size = conv.geometry.output_size((x.shape[2], x.shape[3]))
    y = x.new_zeros(x.shape[0], weight.shape[0], *size)
    return y if bias is None else y + bias[:, None, None]


def hidden_channels(convs: Sequence[nn.Module]) -> int:
    """Channels of the branch's hidden maps."""
    return convs[0].out_channels


def channel_obstacle(convs: Sequence[nn.Module]) -> str | None:
    """Why the hidden channels of this branch cannot be gated together, or None."""
    if len(convs) < 2:
        return "its branch has one convolution, so it has no hidden channels"
    if any(type(conv) is not nn.Conv2d for conv in convs):
        return "its kernels are dynamic; channel gates cut channels out of ordinary convolutions"
    if len({conv.out_channels for conv in convs[:-1]}) > 1:
        return (
            f"its hidden maps have different channels ({', '.join(str(c.out_channels) for c in convs[:-1])})"
        )
    if convs[0].groups > 1 and convs[0].in_channels != convs[0].out_channels:
        return "its first convolution is grouped and changes the number of channels"
    if convs[-1].groups > 1:
        return "its last convolution is grouped, so closed channels would close outputs"
    return None


def channel_groups(convs: Sequence[nn.Module], wanted: int) -> int:
    """The largest number of equal groups up to `wanted` that parts no group of a convolution."""
    common = hidden_channels(convs)
    for conv in convs:
        if conv.groups > 1:
            common = math.gcd(common, conv.groups)
    return max(g for g in range(1, min(wanted, common) + 1) if common % g == 0)


def conv_share(i: int, conv: nn.Module, last: int, kept: Tensor) -> Tensor:
    """Share of a convolution's multiply-adds (with bias) when `kept` of the hidden channels are open."""
    out = kept if i < last else torch.ones_like(kept)
    both = out * kept if i > 0 and conv.groups == 1 else out
    if conv.bias is None:
        return both
    weight, bias = conv.weight.numel(), conv.out_channels
    return (weight * both + bias * out) / (weight + bias)
