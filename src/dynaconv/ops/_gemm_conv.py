"""A convolution evaluated on a list of output rows: gather the taps, multiply, write compact rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv.ops._conv import ConvSpec, activate_

# Floats in one gathered block: about what two cores' level-2 caches hold (measured in benchmarks/executor.py).
CHUNK_FLOATS = 1 << 18


def pack_weight(spec: ConvSpec) -> Tensor:
    """Reorder a convolution weight for `conv_rows`.

    [taps*I, O] for groups = 1, [taps, C] for depthwise, [groups, taps*I/groups, O/groups] otherwise.
    """
    weight, groups = spec.weight, spec.groups
    out_channels, in_channels, kh, kw = weight.shape
    if groups == 1:
        return weight.permute(2, 3, 1, 0).reshape(kh * kw * in_channels, out_channels).contiguous()
    if spec.depthwise:
        return weight.view(out_channels, kh * kw).t().contiguous()
    split = weight.view(groups, out_channels // groups, in_channels, kh, kw)
    return split.permute(0, 3, 4, 2, 1).reshape(groups, kh * kw * in_channels, -1).contiguous()


def conv_rows(source: Tensor, taps: Tensor | None, packed: Tensor, spec: ConvSpec, out: Tensor) -> Tensor:
    """Fill `out` [a, O] with act(conv + bias) for a rows.

    Args:
        source: [R, I] rows to read from.
        taps: [a, kh*kw] rows of `source`, or None when row i of `out` reads just row i of `source`.
        packed: from `pack_weight`.
    """
    count, n_taps = out.shape[0], spec.n_taps
    width = n_taps * source.shape[1]
    chunk = max(256, CHUNK_FLOATS // width) if taps is not None else count
    for start in range(0, count, max(1, chunk)):
        stop = min(start + chunk, count)
        if taps is None:
            gathered = source[start:stop]
        else:
            gathered = source.index_select(0, taps[start:stop].reshape(-1)).view(stop - start, width)
        activate_(_multiply(gathered, packed, spec, out[start:stop]), spec.activation)
    return out


def _multiply(gathered: Tensor, packed: Tensor, spec: ConvSpec, out: Tensor) -> Tensor:
    if spec.groups == 1:
        if spec.bias is None:
            return torch.mm(gathered, packed, out=out)
        return torch.addmm(spec.bias, gathered, packed, out=out)
    rows, n_taps = gathered.shape[0], spec.n_taps
    if spec.depthwise:
        products = gathered.view(rows, n_taps, -1) * packed
        torch.sum(products, dim=1, out=out)
    else:
        per_group = (
            gathered.view(rows, n_taps, spec.groups, -1).permute(2, 0, 1, 3).reshape(spec.groups, rows, -1)
        )
        out.copy_(torch.bmm(per_group, packed).transpose(0, 1).reshape(rows, -1))
    return out if spec.bias is None else out.add_(spec.bias)


def dense_conv(x: Tensor, spec: ConvSpec) -> Tensor:
    """The same convolution at every position: act(conv(x) + bias)."""
    y = F.conv2d(x, spec.weight, spec.bias, spec.stride, spec.padding, spec.dilation, spec.groups)
    return activate_(y, spec.activation) if not y.requires_grad else spec.activate(y)
