"""Handlers of operations that take some channels of a map, or put them into another order.

Parts of a map stay where they are (lower.py); a part of a concatenation is what was concatenated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from dynaconv.engine.build import Builder, handles
from dynaconv.engine.ir import Node, View

# Layouts of maps whose channels are cut into groups, `/` their number or size: see ir.py.
GROUPED, SHUFFLED, MATRIX = "grouped/", "shuffled/", "nc/"


def part(b: Builder, node: fx.Node, view: View, start: int, count: int, layout: str) -> View:
    """Channels [start, start + count) of a map, as a view."""
    source = view.node
    while source.op == "slice" and source.attrs["step"] == 1:
        start, source = start + source.attrs["start"], source.x
    if source.op == "concat":
        place = 0
        for piece in source.inputs.values():
            if (place, piece.size[2]) == (start, count):
                return View(piece, layout)
            place += piece.size[2]
    h, w, channels = source.size
    if (start, count) == (0, channels):
        return View(source, layout)
    return b.add("slice", node, (h, w, count), layout, {"x": source}, start=start, step=1)


def matrix_width(layout: str) -> int:
    """k of a map on a 1x1 grid that is looked at as [N, channels / k, k]; 0 for other layouts."""
    return int(layout.removeprefix(MATRIX)) if layout.startswith(MATRIX) else 0


def _channel_axis(view: View) -> tuple[int, int]:
    """The axis that runs over channels (0: none does), and how many channels each of its steps is."""
    width = matrix_width(view.layout)
    if width:
        return 1, width
    return {"nchw": 1, "nc": 1, "nc1": 1, "ncl": 1, "nhwc": 3}.get(view.layout, 0), 1


def _parts(b: Builder, node: fx.Node, x: Any, sizes: Sequence[int], dim: int) -> list[View] | None:
    if not isinstance(x, View) or x.node.size is None or x.node.is_grid or b.shape(node.args[0]) is None:
        return None
    axis, each = _channel_axis(x)
    if axis == 0 or dim % (1 + len(b.shape(node.args[0]))) != axis or sum(sizes) * each != x.node.size[2]:
        return None
    if any(n < 1 for n in sizes):
        return None
    starts = [each * sum(sizes[:i]) for i in range(len(sizes))]
    return [part(b, node, x, s, each * n, x.layout) for s, n in zip(starts, sizes, strict=True)]


@handles("split_with_sizes", "split", "chunk")
def split(b: Builder, node: fx.Node, args: list, kwargs: dict) -> list[View] | None:
    """Along channels."""
    x, cut, dim = (*args, kwargs.get("dim", 0))[:3]
    name = node.target._schema.name
    before = b.shape(node.args[0]) if isinstance(node.args[0], fx.Node) else None
    if before is None or not isinstance(dim, int) or not 0 < dim % (1 + len(before)):
        return None
    length = before[dim % (1 + len(before)) - 1]
    if isinstance(cut, int):
        step = -(-length // cut) if name == "aten::chunk" else cut
        cut = [min(step, length - at) for at in range(0, length, step)]
    return _parts(b, node, x, list(cut), dim) if all(isinstance(n, int) for n in cut) else None


def channel_slice(b: Builder, node: fx.Node, args: list) -> View | None:
    """x[:, start:end] of a map."""
    x, dim, start, _, step = (*args, *(0, 0, None, 1)[len(args) - 1 :])
    before, after = b.shape(node.args[0]), b.shape(node)
    if before is None or after is None or len(before) != len(after):
        return None
    axis = dim % (1 + len(before))
    if axis == 0 or not isinstance(start or 0, int):
        return None
    start, length = start or 0, before[axis - 1]
    start = max(0, start + length if start < 0 else start)
    if step != 1:
        return _every(b, node, x, start, after[axis - 1], step) if x.layout == "nchw" and axis == 1 else None
    sizes = [start, after[axis - 1], length - start - after[axis - 1]]
    found = _parts(b, node, x, [n for n in sizes if n], dim)
    return None if found is None else found[1 if start else 0]


def _every(b: Builder, node: fx.Node, x: View, start: int, count: int, step: int) -> View:
    """x[:, start::step] of a map."""
    h, w, _ = x.node.size
    return b.add("slice", node, (h, w, count), x.layout, {"x": x.node}, start=start, step=step)


@handles("unflatten")
def unflatten(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Channels on a 1x1 grid as a matrix, or a map's channels as groups."""
    return regrouped(b, node, args[0])


def regrouped(b: Builder, node: fx.Node, x: Any) -> View | None:
    """A view with one more axis: [N, c / k, k] of [N, c], or [N, groups, c / groups, h, w]."""
    shape = b.shape(node)
    if not isinstance(x, View) or x.node.size is None or x.node.is_grid or shape is None:
        return None
    h, w, c = x.node.size
    if (h, w) == (1, 1) and len(shape) == 2 and shape[0] * shape[1] == c and x.layout != "raw":
        return View(x.node, f"{MATRIX}{shape[1]}")
    if x.layout == "nchw" and len(shape) == 4 and shape[0] * shape[1] == c and shape[2:] == (h, w):
        return View(x.node, f"{GROUPED}{shape[0]}")
    return None


@handles("transpose")
def transpose(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """The first half of a channel shuffle: [N, g, c / g, h, w] -> [N, c / g, g, h, w]."""
    x, axes = args[0], {d % 5 for d in args[1:3]}
    if not isinstance(x, View) or not x.layout.startswith(GROUPED) or axes != {1, 2}:
        return None
    return View(x.node, x.layout.replace(GROUPED, SHUFFLED))


@handles("channel_shuffle")
def channel_shuffle(b: Builder, node: fx.Node, args: list, kwargs: dict) -> View | None:
    """Both halves at once."""
    x, groups = args
    if not isinstance(x, View) or x.layout != "nchw" or x.node.is_grid or x.node.size[2] % groups:
        return None
    return shuffled(b, node, View(x.node, f"{SHUFFLED}{groups}"))


def shuffled(b: Builder, node: fx.Node, x: View) -> View | None:
    """The second half: channel j of group i becomes channel j * groups + i."""
    if b.shape(node) is None or len(b.shape(node)) != 3 or b.shape(node)[0] != x.node.size[2]:
        return None
    groups, (h, w, c) = int(x.layout.removeprefix(SHUFFLED)), x.node.size
    each = c // groups
    pieces: dict[str, Node] = {
        str(i): part(b, node, View(x.node, "nchw"), i * each, each, "nchw").node for i in range(groups)
    }
    return b.add("interleave", node, (h, w, c), "nchw", pieces)
