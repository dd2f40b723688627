"""DynConv's mask unit: from a block's input to one keep-or-skip decision per output position.

Source: "Dynamic Convolutions: Exploiting Spatial Sparsity for Faster Inference", arXiv 1912.03203, section 3.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn._fresh import Snapshot
from dynaconv.nn.gate import Gate
from dynaconv.ops import _native
from dynaconv.ops._registry import SQUEEZE_MASK, below_autograd
from dynaconv.ops.mask_ops import conv3x3_to_one, nine_taps, upsample_mask
from dynaconv.ops.mask_ops.logits import OP as MASK_LOGITS

KINDS = ("squeeze", "conv1x1")
INITS = ("paper", "default", "open")


@dataclass(frozen=True, eq=False)
class _Reordered:
    """Weights of a squeeze unit as its fast forms want them, and what they were made of."""

    taps: Tensor
    weight: Tensor
    linear: Tensor
    bias: Tensor
    native: bool
    snapshot: Snapshot

    @classmethod
    def of(cls, conv: nn.Conv2d, linear: nn.Linear) -> _Reordered:
        weight = conv.weight.detach()
        return cls(
            nine_taps(weight).detach(),
            weight.contiguous(memory_format=torch.channels_last),
            linear.weight.detach(),
            linear.bias.detach() + conv.bias.detach(),
            weight.dtype == torch.float32 and _native.missing() is None,
            Snapshot([conv, linear]),
        )


class MaskUnit(Gate):
    """Spatial gate: `squeeze` = Conv3x3(C -> 1) + Linear(C -> 1) of the global average; `conv1x1` = Conv1x1(C -> 1).

    Args:
        in_channels: C of the block's input.
        kind: "squeeze" (classification) or "conv1x1" (pose, cheaper).
        stride: the block's stride; the mask lies on the block's output grid.
        granularity_px: one decision for granularity_px x granularity_px output positions.
        temperature: of the straight-through gradient.
        init: "paper" (He fan-out for squeeze, PyTorch defaults for conv1x1), "default" (PyTorch), or
            "open" (weights near zero, bias `open_bias`: most positions start open).
        open_bias: logit at the start with init="open"; 2 means 88 % open.
        norm: batch norm on the logits, before the noise.
    Shapes:
        x [N, C, H, W] -> mask [N, 1, h, w] with h = (H - 1) // stride + 1.

    >>> MaskUnit(16, stride=2)(torch.randn(2, 16, 9, 8)).shape
    torch.Size([2, 1, 5, 4])
    """

    def __init__(
        self,
        in_channels: int,
        *,
        kind: str = "squeeze",
        stride: int = 1,
        granularity_px: int = 1,
        temperature: float = 1.0,
        init: str = "paper",
        open_bias: float = 2.0,
        norm: bool = False,
    ) -> None:
        super().__init__(temperature)
        _checks.one_of("mask unit kind", kind, KINDS)
        _checks.one_of("mask unit init", init, INITS)
        _checks.positive("in_channels", in_channels)
        _checks.positive("granularity_px", granularity_px)
        self.in_channels, self.kind, self.stride, self.granularity_px = (
            in_channels,
            kind,
            stride,
            granularity_px,
        )
        kernel = 3 if kind == "squeeze" else 1
        self.conv = nn.Conv2d(in_channels, 1, kernel, stride=stride, padding=kernel // 2)
        self.linear = nn.Linear(in_channels, 1) if kind == "squeeze" else None
        self.norm = nn.BatchNorm2d(1) if norm else None
        self._reordered: _Reordered | None = None
        self.reset_parameters(init, open_bias)

    def reset_parameters(self, init: str = "paper", open_bias: float = 2.0) -> None:
        """Initialise the weights (section 1.1 of the papers' code for "paper")."""
        self.conv.reset_parameters()
        if self.linear is not None:
            self.linear.reset_parameters()
        if init == "paper" and self.kind == "squeeze":
            nn.init.normal_(self.conv.weight, std=math.sqrt(2 / 9))
        elif init == "open":
            nn.init.normal_(self.conv.weight, std=0.01)
            nn.init.constant_(self.conv.bias, open_bias)
            if self.linear is not None:
                nn.init.normal_(self.linear.weight, std=0.01)
                nn.init.zeros_(self.linear.bias)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The block's output grid (h, w) for an input grid (H, W)."""
        return (size[0] - 1) // self.stride + 1, (size[1] - 1) // self.stride + 1

    def logits(self, x: Tensor) -> Tensor:
        """Scores [N, 1, h / granularity, w / granularity]."""
        _checks.images(x, self.in_channels, f"MaskUnit({self.in_channels})")
        z = self._reordered_logits(x) if self._can_reorder(x) else self._plain_logits(x)
        if self.norm is not None:
            z = self.norm(z)
        if self.granularity_px > 1:
            z = F.avg_pool2d(z, self.granularity_px, ceil_mode=True)
        return z

    def _plain_logits(self, x: Tensor) -> Tensor:
        if self.kind == "squeeze" and self.training and x.device.type == "cpu":
            # A convolution to one channel leaves vector units idle, forwards and backwards.
            z = conv3x3_to_one(x, nine_taps(self.conv.weight), self.stride) + self.conv.bias[:, None, None]
        else:
            z = self.conv(x)
        if self.linear is not None:
            z = z + self.linear(x.mean((2, 3)))[:, :, None, None]
        return z

    def _can_reorder(self, x: Tensor) -> bool:
        """Whether the reordered form may run: squeeze units in evaluation on a CPU, without gradient or tracing."""
        if self.kind != "squeeze" or self.training or torch.is_grad_enabled() or x.device.type != "cpu":
            return False
        return not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))

    def _reordered_logits(self, x: Tensor) -> Tensor:
        """The same logits from fewer and faster operations: nine taps at once, both biases added with the average."""
        ready = self._ready()
        if ready.native and x.dtype == torch.float32:
            return below_autograd(MASK_LOGITS, x, ready.weight, ready.linear, ready.bias, self.stride)
        average = F.linear(x.mean((2, 3)), self.linear.weight, ready.bias)
        return conv3x3_to_one(x, ready.taps, self.stride).add_(average.view(-1, 1, 1, 1))

    def _ready(self) -> _Reordered:
        if self._reordered is None or not self._reordered.snapshot.fresh():
            self._reordered = _Reordered.of(self.conv, self.linear)
        return self._reordered

    def _mask_at_once(self, x: Tensor) -> Tensor | None:
        """The mask by one call of the compiled kernel, or None where that is not possible."""
        own = type(self).logits is MaskUnit.logits and type(self).decide is Gate.decide
        if not own or self.granularity_px > 1 or self.norm is not None or not self._can_reorder(x):
            return None
        ready = self._ready()
        if not ready.native or x.dtype is not torch.float32:
            return None
        _checks.images(x, self.in_channels, f"MaskUnit({self.in_channels})")
        return below_autograd(
            SQUEEZE_MASK, x, ready.weight, ready.linear, ready.bias, self.stride, self.threshold
        )

    def train(self, mode: bool = True) -> MaskUnit:
        """Switch mode; the reordered weights are dropped, since training will change what they were made of."""
        self._reordered = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Copies and pickles leave the reordered weights behind; they are made again on first use."""
        return {**self.__dict__, "_reordered": None}

    def forward(self, x: Tensor) -> Tensor:
        """Mask [N, 1, h, w] of 0 and 1 on the block's output grid."""
        mask = self._mask_at_once(x)
        if mask is not None:
            return mask
        mask = self.decide(self.logits(x))
        if self.granularity_px == 1:
            return mask
        return upsample_mask(mask, self.granularity_px, self.grid((x.shape[2], x.shape[3])))

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image: 9C + 1 (squeeze) or C + 1 per output position; the Linear is not counted."""
        h, w = self.grid(size)
        return (self.conv.weight.numel() + 1) * h * w

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{self.in_channels}, kind={self.kind!r}, stride={self.stride}, granularity_px={self.granularity_px}"
