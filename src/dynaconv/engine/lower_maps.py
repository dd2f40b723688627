"""Steps of what is neither a convolution nor a mask: pools, means, element by element, parts of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from dynaconv.engine.fuse import already
from dynaconv.engine.ir import Node
from dynaconv.engine.plan import Conv

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering


def _max_pool(lowering: Lowering, node: Node) -> None:
    source = lowering.value(node.x)
    lowering.step("max_pool", node, input=source, out=lowering.result(node), conv=lowering.geometry(node))


def _avg_pool(lowering: Lowering, node: Node) -> None:
    ints = [int(node.attrs["include_pad"])] + [0] * 7
    source = lowering.value(node.x)
    lowering.step(
        "avg_pool", node, input=source, out=lowering.result(node), conv=lowering.geometry(node), ints=ints
    )


def _mean(lowering: Lowering, node: Node) -> None:
    if node in lowering.values:
        # The step before took it on the way.
        return
    source = lowering.value(node.x)
    lowering.step("mean", node, input=source, out=lowering.result(node), grid=_grid(lowering, node))


def _act(lowering: Lowering, node: Node) -> None:
    source = lowering.value(node.x)
    acts = [node.attrs["act"], "none", "none"]
    fields = {"input": source, "out": lowering.result(node), "grid": _grid(lowering, node)}
    lowering.step("activate", node, activation=acts, **fields)


def _slopes(lowering: Lowering, node: Node) -> None:
    slopes, source = node.attrs["slopes"], lowering.value(node.x)
    conv = lowering.conv_data(Conv("slopes", len(slopes), len(slopes), bias=slopes))
    fields = {"input": source, "out": lowering.result(node), "grid": _grid(lowering, node)}
    lowering.step("activate", node, conv=conv, ints=[2] + [0] * 7, **fields)


def _resample(lowering: Lowering, node: Node) -> None:
    axes = [node.attrs["lines"], node.attrs["columns"]]
    taps = torch.cat([axis.reshape(-1, 2) for axis in axes])
    kernel = axes[0].shape[1], axes[1].shape[1]
    source = lowering.value(node.x)
    conv = lowering.conv_data(Conv("taps", node.x.size[2], len(taps), kernel=kernel, weight=taps))
    ints = [*node.attrs["parts"], *node.attrs["first"]] + [0] * 4
    lowering.step("resample", node, input=source, out=lowering.result(node), conv=conv, ints=ints)


def _grid(lowering: Lowering, node: Node) -> int:
    """The grid of the rows that are needed, -1: all."""
    return lowering.grids[node.inputs["grid"]] if "grid" in node.inputs else -1


def _add(lowering: Lowering, node: Node) -> None:
    _pairwise(lowering, node, "add")


def _sub(lowering: Lowering, node: Node) -> None:
    _pairwise(lowering, node, "add", ints=[1] + [0] * 7)


def _mul(lowering: Lowering, node: Node) -> None:
    _pairwise(lowering, node, "multiply")


def _weighted_add(lowering: Lowering, node: Node) -> None:
    total, weight = node.x, node.inputs["weight"]
    first = lowering.value(total)
    share = first if lowering.is_last_reader(node, total) else -1
    settled = int(already(total, node.attrs.get("act", "none")))
    if weight.is_grid:
        _add_open(lowering, node, share, bool(settled))
        return
    weight = lowering.value(weight)
    _pairwise(lowering, node, "add", share, aux=[weight, -1, -1, -1], ints=[0, settled] + [0] * 6)


def _add_open(lowering: Lowering, node: Node, share: int, settled: bool) -> None:
    """Open rows are added; closed ones become what they are added to, with the activation unless that is `settled`."""
    grid = lowering.grids[node.inputs["weight"]]
    _pairwise(lowering, node, "add", share, grid=grid)
    source, out = lowering.value(node.x), lowering.value(node)
    if not settled or lowering.plan.values[source].place != lowering.plan.values[out].place:
        acts = ["none" if settled else node.attrs["act"], "none", "none"]
        lowering.step("activate", node, input=source, out=out, activation=acts, grid=grid, closed=1)


def _scale(lowering: Lowering, node: Node) -> None:
    source, attrs = lowering.value(node.x), node.attrs
    floats, acts = [attrs["scale"], attrs["shift"], 0.0, 0.0], [attrs["act"], "none", "none"]
    out, ints = lowering.result(node), [1] + [0] * 7
    lowering.step("activate", node, input=source, out=out, activation=acts, ints=ints, floats=floats)


def _layer_norm(lowering: Lowering, node: Node) -> None:
    c, source = node.size[2], lowering.value(node.x)
    conv = lowering.conv_data(Conv("norm", c, c, weight=node.attrs["weight"], bias=node.attrs["bias"]))
    floats = [float(node.attrs["eps"]), 0.0, 0.0, 0.0]
    fields = {"input": source, "out": lowering.result(node), "grid": _grid(lowering, node)}
    lowering.step("layer_norm", node, conv=conv, floats=floats, **fields)


def _softmax(lowering: Lowering, node: Node) -> None:
    ints, floats = [node.attrs["group"]] + [0] * 7, [node.attrs["scale"], 0.0, 0.0, 0.0]
    source = lowering.value(node.x)
    lowering.step("softmax", node, input=source, out=lowering.result(node), ints=ints, floats=floats)


def _slice(lowering: Lowering, node: Node) -> None:
    source, start, step = lowering.value(node.x), node.attrs["start"], node.attrs["step"]
    inside = lowering.plan.values[source].external < 0 and not lowering.is_made(node)
    if inside and step == 1 and node not in lowering.pieces:
        lowering.part(node, source, start)
    else:
        lowering.step(
            "copy", node, input=source, out=lowering.result(node), ints=[0, start, 1, step] + [0] * 4
        )


def _concat(lowering: Lowering, node: Node) -> None:
    out, channel = lowering.whole(node), 0
    for piece in node.inputs.values():
        source, whole = lowering.value(piece), lowering.plan.values[out]
        if lowering.plan.values[source].place != (whole.storage, whole.first + channel):
            lowering.step("copy", node, input=source, out=out, ints=[channel] + [0] * 7)
        channel += piece.size[2]


def _interleave(lowering: Lowering, node: Node) -> None:
    sources = [lowering.value(piece) for piece in node.inputs.values()]
    out = lowering.result(node)
    for i, source in enumerate(sources):
        lowering.step("copy", node, input=source, out=out, ints=[i, 0, len(sources)] + [0] * 5)


def _repeat(lowering: Lowering, node: Node) -> None:
    source, times, out = lowering.value(node.x), node.attrs["times"], lowering.result(node)
    for i in range(times):
        lowering.step("copy", node, input=source, out=out, ints=[i, 0, times] + [0] * 5)


def _pairwise(lowering: Lowering, node: Node, kind: str, share: int = -1, **fields: Any) -> None:
    first, second = lowering.value(node.x), lowering.value(node.inputs["y"])
    acts = [node.attrs.get("act", "none"), "none", "none"]
    fields.setdefault("grid", _grid(lowering, node))
    out = lowering.result(node, share)
    lowering.step(kind, node, input=first, input2=second, out=out, activation=acts, **fields)


EMIT = {
    "max_pool": _max_pool,
    "avg_pool": _avg_pool,
    "mean": _mean,
    "act": _act,
    "slopes": _slopes,
    "resample": _resample,
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "weighted_add": _weighted_add,
    "scale": _scale,
    "layer_norm": _layer_norm,
    "softmax": _softmax,
    "slice": _slice,
    "concat": _concat,
    "interleave": _interleave,
    "repeat": _repeat,
}
