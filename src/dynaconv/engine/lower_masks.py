"""Steps that decide where to compute: gates, thresholds, masks of other sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from dynaconv.engine import pack
from dynaconv.engine.ir import Node
from dynaconv.engine.lower_convolutions import is_picture
from dynaconv.engine.plan import Conv, GateInfo, Grid

if TYPE_CHECKING:
    from dynaconv.engine.lower import Lowering

_MOST_TAPS = 256


def _gate(lowering: Lowering, node: Node) -> None:
    weight = node.attrs["weight"]
    source = (lowering.external if _reads_picture(node) else lowering.value)(node.x)
    packed = pack.pack_gate(weight, node.attrs.get("linear"), node.attrs["bias"])
    geometry = (node.attrs[k] for k in ("stride", "padding", "dilation"))
    conv = Conv("gate", weight.shape[1], 1, 1, tuple(weight.shape[2:]), *geometry, *packed)
    tap_bias = node.attrs.get("tap_bias")
    if tap_bias is not None:
        conv.bias = torch.cat([conv.bias, tap_bias])
    ints, aux = [int(node.attrs["squeeze"]), int(tap_bias is not None)] + [0] * 6, [-1] * 4
    if node.attrs["squeeze"]:
        # One sum for each line of the map.
        aux[0] = lowering.room((lowering.plan.values[source].height, 1, 1), f"{node.layer} sums")
    out = lowering.result(node)
    lowering.step("gate", node, input=source, out=out, conv=lowering.conv_data(conv), ints=ints, aux=aux)


def _reads_picture(node: Node) -> bool:
    """Windows of 3x3 have a kernel for pictures in planes."""
    kernel, stride = tuple(node.attrs["weight"].shape[2:]), node.attrs["stride"]
    fits = kernel == (3, 3) and node.attrs["padding"] == node.attrs["dilation"] == (1, 1)
    return is_picture(node.x) and fits and stride in ((1, 1), (2, 2))


def _threshold(lowering: Lowering, node: Node) -> None:
    logits = lowering.value(node.x)
    grid = _grid(lowering, node, node.attrs.get("gate", ""))
    floats = [float(node.attrs["threshold"]), 0.0, 0.0, 0.0]
    within = lowering.grids[node.inputs["within"]] if "within" in node.inputs else -1
    lowering.step("threshold", node, input=logits, grid=grid, grid2=within, floats=floats)
    _tell_gate(lowering, node, grid)
    _mask_out(lowering, node)


def _open_channels(lowering: Lowering, node: Node) -> None:
    """A mask of 1 x channels positions."""
    logits = lowering.value(node.x)
    lowering.plan.grids.append(Grid(1, node.size[2], gate=node.attrs.get("gate", "")))
    lowering.grids[node] = grid = len(lowering.plan.grids) - 1
    lowering.step(
        "threshold", node, input=logits, grid=grid, floats=[float(node.attrs["threshold"]), 0.0, 0.0, 0.0]
    )
    _tell_gate(lowering, node, grid)
    _mask_out(lowering, node)


def _upsample(lowering: Lowering, node: Node) -> None:
    factors, size = node.attrs["factors"], node.size
    kernel = (min(factors[0], size[0]), min(factors[1], size[1]))
    source = lowering.grids[node.x]
    rows = source
    # A decision for a whole map would have more taps than a kernel may have: along rows, then along columns.
    if kernel[0] * kernel[1] > _MOST_TAPS:
        lowering.plan.grids.append(Grid(size[0], node.x.size[1]))
        rows = len(lowering.plan.grids) - 1
        conv = lowering.conv_data(Conv("none", 1, 1, 1, (kernel[0], 1), (factors[0], 1)))
        lowering.step("dilate", node, grid=source, grid2=rows, conv=conv)
        kernel, factors = (1, kernel[1]), (1, factors[1])
    conv = lowering.conv_data(Conv("none", 1, 1, 1, kernel, factors))
    grid = _grid(lowering, node, lowering.plan.grids[source].gate)
    # Forced masks have the size of the gate's result, which is this one.
    for gate in lowering.plan.gates:
        if gate.grid == source:
            gate.grid = grid
    lowering.step("dilate", node, grid=rows, grid2=grid, conv=conv)
    _mask_out(lowering, node)


def _dilate(lowering: Lowering, node: Node) -> None:
    source = lowering.grids[node.inputs["grid"]]
    grid = _grid(lowering, node)
    lowering.step("dilate", node, grid=source, grid2=grid, conv=lowering.geometry(node))
    _mask_out(lowering, node)


def _grid(lowering: Lowering, node: Node, gate: str = "") -> int:
    h, w, _ = node.size
    lowering.plan.grids.append(Grid(h, w, gate=gate))
    lowering.grids[node] = len(lowering.plan.grids) - 1
    return lowering.grids[node]


def _tell_gate(lowering: Lowering, node: Node, grid: int) -> None:
    """The last step is the decision of a gate that the network names."""
    if node.attrs.get("gate") is None:
        return
    budgets = node.attrs.get("budgets", [])
    about = node.attrs.get("scope", "position"), node.attrs.get("dial", True)
    step = len(lowering.plan.steps) - 1
    lowering.plan.gates.append(GateInfo(node.attrs["gate"], grid, step, budgets, *about))


def _mask_out(lowering: Lowering, node: Node) -> None:
    if lowering.is_made(node):
        lowering.value(node)


EMIT = {
    "gate": _gate,
    "threshold": _threshold,
    "open_channels": _open_channels,
    "upsample": _upsample,
    "dilate": _dilate,
}
