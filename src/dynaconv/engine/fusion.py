"""DCD's convolutions, from the operator in the exported graph: a static weight, scaled, and a low-rank part.

Source: arXiv 2103.08756, equation 6; the norms and the hard gate of github.com/liyunsheng13/dcd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.build_ops import is_map, pair
from dynaconv.engine.build_parts import matrix_width
from dynaconv.engine.fold import zero_bias
from dynaconv.engine.ir import Constant, Node, View
from dynaconv.engine.scales import before_hard_gate, is_uniform

_NAMES = (
    "x", "weight", "bias", "q", "p", "scale", "fusion", "scale1", "shift1", "scale2", "shift2", "stride", "padding",
    "dilation", "groups",
)  # fmt: skip


@dataclass
class LowRank:
    """What a channel fusion adds to its convolution: P (matrix (Q x + shift)).

    q [L, I] and shift [L] with the norm after Q in them; p [O, L]; inner [O], the bias that is scaled with the weight;
    gated: the scale is h(z) = relu6(z + 3) / 3 of the coefficients' first part. The norm after the matrix is in the
    coefficients and in the convolution's bias.
    """

    q: Tensor
    shift: Tensor
    p: Tensor
    inner: Tensor
    gated: bool

    def scaled(self, scale: Tensor) -> LowRank:
        """With every output times a number, [O]."""
        p, inner = self.p.double() * scale[:, None], self.inner.double() * scale
        return LowRank(self.q, self.shift, p.float(), inner.float(), self.gated)

    def folds(self, taps: int, positions: int) -> bool:
        """A kernel for each image takes fewer multiply-adds than the low-rank part at `positions` outputs."""
        (rank, inputs), outputs = self.q.shape, self.p.shape[0]
        folded = rank * rank * min(inputs, outputs) + outputs * inputs * (rank + taps)
        return folded < positions * rank * (inputs + rank + outputs)


@handles("dynaconv::channel_fusion")
def channel_fusion(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | str | None:
    """A convolution like others for the passes, with `low_rank`; "coefficients" are its scale, then its matrix."""
    call = dict.fromkeys(_NAMES) | dict(zip(_NAMES, args, strict=False)) | kwargs
    fixed = {k: call[k] for k in ("weight", "bias", "q", "p", "scale1", "shift1", "scale2", "shift2")}
    if any(not isinstance(t, Constant | None) for t in fixed.values()):
        return "its weights depend on the input"
    size = b.map_size(node, "nchw")
    if not is_map(call["x"], "nchw") or size is None or call["weight"].tensor.dim() != 4:
        return "only 2-d convolutions in float32 over images of a fixed size have kernels"
    if call["groups"] > 1 and call["groups"] == call["x"].node.size[2]:
        return "a depthwise convolution with a part that is dense over channels has no kernel"
    known = {k: None if t is None else t.tensor.float() for k, t in fixed.items()}
    q, p = known["q"].flatten(1), known["p"].flatten(1)
    ones, zeros = torch.ones(len(q)), torch.zeros(len(q))
    scale1, shift1, scale2, shift2 = (
        default if known[name] is None else known[name]
        for name, default in (("scale1", ones), ("shift1", zeros), ("scale2", ones), ("shift2", zeros))
    )
    found = _coefficients(b, node, call["scale"], call["fusion"], scale2)
    if found is None:
        return "its coefficients are not those of DCD's own router"
    coefficients, gated = found
    inner = torch.zeros(len(p)) if known["bias"] is None else known["bias"]
    part = LowRank(q * scale1[:, None], shift1, p, inner, gated)
    return b.add(
        "conv", node, size, "nchw", {"x": call["x"].node, "coefficients": coefficients},
        weight=known["weight"], low_rank=part, bias=(p.double() @ shift2.double()).float(), stride=pair(call["stride"]),
        padding=pair(call["padding"]), dilation=pair(call["dilation"]), groups=call["groups"], act="none",
    )  # fmt: skip


def _coefficients(
    b: Builder, node: fx.Node, scale: Any, fusion: Any, scale2: Tensor
) -> tuple[Node, bool] | None:
    """One row an image: what the scale comes from, then scale2 * Phi + 1, transposed; and whether that is gated.

    Both come from linear layers, so the norm and the one go into the matrix's, and one layer serves where both read the
    same.
    """
    rank = len(scale2)
    if not is_map(scale, "nc") or not isinstance(fusion, View) or fusion.node.size != (1, 1, rank * rank):
        return None
    if matrix_width(fusion.layout) != rank and (fusion.layout, rank) != ("nc1", 1):
        return None
    if not _is_linear(fusion.node):
        return None
    weight, bias = fusion.node.attrs["weight"].flatten(1).double(), zero_bias(fusion.node).double()
    weight, bias = weight.reshape(rank, rank, -1), bias.reshape(rank, rank)
    weight = (weight * scale2[:, None, None]).transpose(0, 1).reshape(rank * rank, -1)
    bias = (bias * scale2[:, None] + torch.eye(rank)).t().reshape(-1)
    source = before_hard_gate(scale.node)
    gated = source is not None and is_uniform(scale.node, 1 / 3, 0)
    first = source if gated else scale.node
    if _is_linear(first) and first.x is fusion.node.x:
        weight = torch.cat([first.attrs["weight"].flatten(1).double(), weight])
        bias = torch.cat([zero_bias(first).double(), bias])
        return _linear(b, node, fusion.node.x, weight, bias), gated
    matrix = _linear(b, node, fusion.node.x, weight, bias)
    size = (1, 1, first.size[2] + rank * rank)
    return b.add("concat", node, size, "nc", {"0": first, "1": matrix}).node, gated


def _linear(b: Builder, node: fx.Node, x: Node, weight: Tensor, bias: Tensor) -> Node:
    options = {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1), "groups": 1, "act": "none"}
    weight = weight.float()[:, :, None, None]
    made = b.add(
        "conv", node, (1, 1, len(weight)), "nc", {"x": x}, weight=weight, bias=bias.float(), **options
    )
    return made.node


def _is_linear(node: Node) -> bool:
    """A linear layer on a 1x1 grid."""
    if node.op != "conv" or node.is_mixed or node.attrs["act"] != "none" or node.attrs["groups"] != 1:
        return False
    return node.x.size[:2] == (1, 1) and tuple(node.attrs["weight"].shape[2:]) == (1, 1)
