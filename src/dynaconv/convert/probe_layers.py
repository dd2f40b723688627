"""Layers whose use of positions is known from their arguments: convolutions, linear layers, windows, padding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.utils import _pair

from dynaconv.convert.tracing import is_noise
from dynaconv.nn.block_program import NCHW, Op, Ref, filled
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.ops._conv import Geometry, numeric_padding

if TYPE_CHECKING:
    from dynaconv.convert.probing import Probe


class Unsupported(Exception):
    """An operation that masked execution cannot follow, with the reason."""


class OtherWidth(Exception):
    """The block's input has another number of channels than was tried."""


_PADS = {"constant": "zeros", **{mode: mode for mode in ("reflect", "replicate", "circular")}}
_PAD_LAYERS = {
    nn.ZeroPad2d: "constant", nn.ConstantPad2d: "constant", nn.ReflectionPad2d: "reflect",
    nn.ReplicationPad2d: "replicate", nn.CircularPad2d: "circular",
}  # fmt: skip


def known_layer(probe: Probe, op: Op, maps: list[str]) -> bool:
    """Put the operation into the probe if it is one of these layers on one map.

    Raises:
        Unsupported: such a layer in a form without masked execution. OtherWidth: it wants other channels.
    """
    if len(maps) != 1 or op.args[:1] != (Ref(maps[0]),):
        return False
    source = maps[0]
    if op.call == "module":
        layer = probe.block.get_submodule(op.target)
        if isinstance(layer, (nn.Conv2d, DynamicConv)):
            _convolution(probe, op, layer, source)
        elif isinstance(layer, nn.Linear):
            _linear(probe, op, layer, source)
        elif isinstance(layer, nn.AvgPool2d) and _is_plain(layer) and probe.layout(source) == NCHW:
            geometry = Geometry(_pair(layer.kernel_size), _pair(layer.stride), (0, 0), (1, 1))
            _window(probe, op, source, geometry, probe.channels(source))
        elif type(layer) in _PAD_LAYERS:
            left, right, top, bottom = layer.padding
            value = getattr(layer, "value", None)
            _pad(probe, op, source, [left, right, top, bottom], _PAD_LAYERS[type(layer)], value)
        elif isinstance(layer, _BatchNorm):
            _batch_norm(probe, op, layer, source)
        elif is_noise(layer):
            probe.put_map(
                op.name, probe.random(*probe.whole[source].shape), probe.layout(source), probe.grid[source]
            )
            probe.put(op, layout=probe.layout(source))
        else:
            return False
        return True
    if op.target is F.pad and not _pads_channels(probe, op, source):
        call = {**dict(zip(("input", "pad", "mode", "value"), op.args, strict=False)), **op.kwargs}
        _pad(probe, op, source, list(call.get("pad") or ()), call.get("mode", "constant"), call.get("value"))
        return True
    if op.target in (F.conv2d, torch.conv2d) and not any(probe.is_pooled(s) for s in op.sources):
        _functional_convolution(probe, op, source)
        return True
    return False


def _convolution(probe: Probe, op: Op, conv: nn.Module, source: str) -> None:
    if type(conv) is not nn.Conv2d and not isinstance(conv, DynamicConv):
        raise Unsupported(f"{op.target} is {type(conv).__name__}, expected nn.Conv2d")
    if isinstance(conv, DynamicConv) and conv.padding_mode != "zeros":
        raise Unsupported(f"{op.target} has padding {conv.padding!r} ({conv.padding_mode})")
    try:
        geometry = Geometry.of(conv)
    except ValueError as error:
        raise Unsupported(f"{op.target} has {error}") from error
    if probe.layout(source) != NCHW:
        raise Unsupported(f"{op.target} reads a map that is not [N, C, H, W]")
    if probe.channels(source) != conv.in_channels:
        raise OtherWidth
    weights = conv.kernel_numel if isinstance(conv, DynamicConv) else conv.weight.numel()
    _window(
        probe,
        op,
        source,
        geometry,
        conv.out_channels,
        weights=weights,
        path=op.target,
        mode=conv.padding_mode,
    )


def _functional_convolution(probe: Probe, op: Op, source: str) -> None:
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = filled(op.args, probe.whole), filled(op.kwargs, probe.whole)
    call = {**dict(zip(names, given[0], strict=False)), **given[1]}
    weight, padding = call["weight"], call.get("padding", 0)
    if probe.layout(source) != NCHW:
        raise Unsupported("a convolution in its forward reads a map that is not [N, C, H, W]")
    if weight.shape[1] * call.get("groups", 1) != probe.channels(source):
        raise OtherWidth
    kernel, dilation = tuple(weight.shape[2:]), _pair(call.get("dilation", 1))
    try:
        padding = numeric_padding(padding if isinstance(padding, str) else _pair(padding), kernel, dilation)
    except ValueError as error:
        raise Unsupported(f"a convolution in its forward has {error}") from error
    geometry = Geometry(kernel, _pair(call.get("stride", 1)), padding, dilation)
    bias = 0 if call.get("bias") is None else weight.shape[0]
    _window(probe, op, source, geometry, weight.shape[0], weights=weight.numel(), bias=bias)


def _is_plain(pool: nn.AvgPool2d) -> bool:
    """Every window lies inside of the map and has one divisor."""
    return _pair(pool.padding) == (0, 0) and not pool.ceil_mode and not pool.divisor_override


def _pads_channels(probe: Probe, op: Op, source: str) -> bool:
    """Channels are added and no position is, as in shortcuts without a convolution (option A of arXiv 1512.03385)."""
    pad = filled(op.kwargs.get("pad", op.args[1] if len(op.args) > 1 else ()), probe.whole)
    return probe.layout(source) == NCHW and len(pad) == 6 and tuple(pad[:4]) == (0, 0, 0, 0)


def _pad(probe: Probe, op: Op, source: str, pad: list[int], mode: str, value: float | None) -> None:
    """pad: left, right, top, bottom."""
    even = len(pad) == 4 and all(isinstance(p, int) for p in pad) and pad[0] == pad[1] and pad[2] == pad[3]
    if not even or mode not in _PADS or value or probe.layout(source) != NCHW or min(pad) < 0:
        raise Unsupported(f"it pads unevenly or with values ({pad}, {mode})")
    geometry = Geometry((1, 1), (1, 1), (pad[2], pad[0]), (1, 1))
    _window(probe, op, source, geometry, probe.channels(source), mode=_PADS[mode])


def _window(probe: Probe, op: Op, source: str, geometry: Geometry, channels: int, **found: Any) -> None:
    grid = geometry.output_size(probe.grid[source])
    if min(grid) < 1:
        raise Unsupported(f"{op.target} leaves nothing of a map of {probe.grid[source]}")
    images = probe.whole[source].shape[0]
    probe.put_map(op.name, probe.random(images, channels, *grid), NCHW, grid)
    probe.put(op, role="window", layout=NCHW, geometry=geometry, **found)


def _linear(probe: Probe, op: Op, linear: nn.Linear, source: str) -> None:
    before, layout = probe.whole[source], probe.layout(source)
    if layout != (1, 2) or before.dim() != 4:
        raise Unsupported(f"{op.target} (Linear) mixes positions")
    if before.shape[-1] != linear.in_features:
        raise OtherWidth
    after = probe.random(*before.shape[:-1], linear.out_features)
    probe.put_map(op.name, after, layout, probe.grid[source])
    probe.put(op, layout=layout, weights=linear.weight.numel(), path=op.target)


def _batch_norm(probe: Probe, op: Op, norm: _BatchNorm, source: str) -> None:
    if not norm.track_running_stats:
        raise Unsupported(f"{op.target} is {type(norm).__name__} without running statistics")
    if probe.layout(source) != NCHW:
        raise Unsupported(f"{op.target} reads a map that is not [N, C, H, W]")
    if probe.channels(source) != norm.num_features:
        raise OtherWidth
    probe.put_map(op.name, probe.random(*probe.whole[source].shape), NCHW, probe.grid[source])
    probe.put(op, layout=NCHW)
