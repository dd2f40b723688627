"""What happens between the convolutions of a masked branch besides single activations: regions, squeeze-excite, joins.

A region is a stretch of nodes that work on each position by itself: a GELU written with Erf, a layer norm with the
linear layers behind it in the layout [N, h, w, C]. Squeeze-excite scales channels by a function of their mean over
open positions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynaconv.export.graph import Writer, attribute, constant, only_user
from dynaconv.export.own import BINNED

_ELEMENTWISE = (
    "Abs",
    "Log",
    "Add",
    "Sub",
    "Mul",
    "Div",
    "Pow",
    "Erf",
    "Sigmoid",
    "Tanh",
    "Relu",
    "Gelu",
    "HardSigmoid",
    "Softplus",
)
_TO_LAST, _TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)


@dataclass(eq=False)
class Region:
    """`nodes` in order make the result of `node` of `source`; both maps are [N, C, h, w].

    entry is what the nodes read: `source`, or the same in the layout [N, h, w, C]; end is what the last one makes.
    """

    node: Any
    nodes: list[Any]
    source: Any
    entry: Any
    end: Any
    inner: list[Any]

    @property
    def last(self) -> bool:
        """The nodes work on [N, h, w, C]."""
        return self.entry is not self.source


@dataclass(eq=False)
class Squeeze:
    """`node` multiplies `source` [N, C, h, w] by `scale` [N, C, 1, 1], which comes from `total`.

    total: a ReduceSum over the positions of mask * source, or where `mask` is None a GlobalAveragePool of source. Of
        `Pooled` also means over parts of the map, of mask * source or of source.
    """

    node: Any
    source: Any
    scale: Any
    total: Any
    mask: Any
    nodes: list[Any] = field(default_factory=list)


@dataclass(eq=False)
class Pooled:
    """`total` is made of `source` [N, C, h, w]: see `Squeeze`. nodes: those between."""

    source: Any
    total: Any
    mask: Any
    nodes: list[Any]


@dataclass(eq=False)
class PerImage:
    """`node` adds a computed vector for each image, `vector` [N, C, 1, 1], to `source`, or multiplies by it."""

    node: Any
    source: Any
    vector: Any

    @property
    def nodes(self) -> list[Any]:
        """The nodes that it stands for."""
        return [self.node]


@dataclass(eq=False)
class Joined:
    """`node` puts what a convolution reads, `beside`, and what becomes of its result, `source`, together as channels.

    Source: ghost modules, arXiv 1911.11907, figure 1.
    """

    node: Any
    beside: Any
    source: Any

    @property
    def nodes(self) -> list[Any]:
        """The node."""
        return [self.node]

    @property
    def first(self) -> bool:
        """What the convolution reads makes the first channels."""
        return self.node.inputs[0] is self.beside


def find_region(node: Any) -> Region | None:
    """The shortest region that ends with this node."""
    turned = node.op_type == "Transpose" and tuple(attribute(node, "perm", ())) == _TO_FIRST
    end = node.inputs[0] if turned else node.outputs[0]
    nodes, open_ends = [], [end]
    while True:
        made = [value for value in open_ends if value.producer() is not None]
        if nodes and len(open_ends) == 1 and (not turned or _turns(made)):
            break
        latest = made[0] if len(made) == 1 else max(made, key=_place, default=None)
        if latest is None or not _allowed(latest.producer(), turned):
            return None
        nodes.insert(0, latest.producer())
        open_ends.remove(latest)
        fresh = [v for v in latest.producer().inputs if v is not None and constant(v) is None]
        open_ends += [v for v in dict.fromkeys(fresh) if all(v is not old for old in open_ends)]
    entry = open_ends[0]
    if not _closed(nodes, end):
        return None
    ends = [entry.producer(), node] if turned else []
    source = entry.producer().inputs[0] if turned else entry
    return Region(node, nodes, source, entry, end, [*nodes, *ends])


def _turns(values: list[Any]) -> bool:
    producer = values[0].producer() if values else None
    return (
        producer is not None
        and producer.op_type == "Transpose"
        and tuple(attribute(producer, "perm", ())) == _TO_LAST
        and len(values[0].uses()) >= 1
    )


def _place(value: Any) -> int:
    """Where in the graph a value is made."""
    node = value.producer()
    return next(i for i, other in enumerate(node.graph) if other is node)


def _allowed(node: Any, last: bool) -> bool:
    if node.op_type == "LayerNormalization":
        return last and attribute(node, "axis", -1) in (-1, 3)
    if node.op_type == "MatMul":
        weight = constant(node.inputs[1])
        return last and weight is not None and weight.ndim == 2
    if node.op_type not in _ELEMENTWISE or node.domain:
        return False
    return all(_fits(constant(v), last) for v in node.inputs if v is not None and constant(v) is not None)


def _fits(array: Any, last: bool) -> bool:
    """One number, or one for each channel."""
    if array.size == 1:
        return True
    shape = array.shape
    return shape[-1] == array.size if last else len(shape) >= 3 and shape[-3] == array.size


def _closed(nodes: list[Any], end: Any) -> bool:
    """Nobody else reads what the nodes make in between."""
    inside = set(nodes)
    values = [v for node in nodes for v in node.outputs if v is not end]
    return all(not v.is_graph_output() and all(u.node in inside for u in v.uses()) for v in values)


def apply_region(write: Writer, region: Region, rows: Any) -> Any:
    """The same nodes on rows [K, C]."""
    made = {region.entry: rows}
    for node in region.nodes:
        inputs = [made[v] if v in made else _vector(write, v) for v in node.inputs]
        attributes = {name: a.value for name, a in node.attributes.items()}
        if node.op_type == "LayerNormalization":
            attributes["axis"] = -1
        made[node.outputs[0]] = write(node.op_type, *inputs, **attributes)
    return made[region.end]


def _vector(write: Writer, value: Any) -> Any:
    array = constant(value)
    matrix = array.ndim == 2 and min(array.shape) > 1
    return write.constant(array if matrix else array.reshape(-1))


def find_squeeze(node: Any) -> Squeeze | None:
    """Squeeze-excite that ends with this product."""
    if node.op_type != "Mul" or len(set(node.inputs)) != 2:
        return None
    for source, scale in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        if not _is_map(source) or not _is_pooled(scale) or scale.producer() is None:
            continue
        users = [use.node for use in source.uses() if use.node is not node]
        if len(users) != 1 or len(source.uses()) != 2 or source.is_graph_output():
            continue
        found = find_pooled(users[0], source, scale)
        if found is not None:
            return Squeeze(
                node,
                source,
                scale,
                found.total,
                found.mask,
                [node, *(n for n in found.nodes if n is not node)],
            )
    return None


def find_pooled(product: Any, source: Any, result: Any) -> Pooled | None:
    """The mean of `source`, or its sum over open positions, that begins with this node and that `result` comes from."""
    total, mask, nodes, read = product, None, [product], source
    reader = _pooling(total.outputs[0])
    if total.op_type == "Reshape" and reader is not None:
        # Positions along one axis.
        read, total = total.outputs[0], reader
    if total.op_type == "Mul":
        mask = next((v for v in total.inputs if v is not read), None)
        nodes.append(total)
        reader = _pooling(total.outputs[0])
        total = total if reader is None else reader
    sums = total.op_type == "ReduceSum" and len(total.inputs) > 1 and _over_positions(total)
    means = mask is None and total.op_type == "GlobalAveragePool"
    if (sums and mask is not None or means or total.op_type == BINNED) and _comes_from(result, total):
        return Pooled(source, total, mask, list(dict.fromkeys((*nodes, total))))
    return None


def _pooling(value: Any) -> Any:
    """The only reader of a value, or the node of our own that stands beside its other readers."""
    binned = [use.node for use in value.uses() if use.node.op_type == BINNED]
    return binned[0] if len(binned) == 1 else only_user(value)


def find_per_image(node: Any) -> PerImage | None:
    """A vector for each image that comes from elsewhere: the bias of a convolution with computed kernels."""
    if node.op_type not in ("Add", "Mul") or len(set(node.inputs)) != 2:
        return None
    for source, vector in (tuple(node.inputs), tuple(node.inputs)[::-1]):
        made = vector.producer() is not None and source.producer() is not None
        if made and _is_map(source) and not _is_pooled(source) and _is_pooled(vector):
            if list(vector.shape)[1] == list(source.shape)[1]:
                return PerImage(node, source, vector)
    return None


def _is_map(value: Any) -> bool:
    return value.shape is not None and len(value.shape) == 4 and isinstance(value.shape[1], int)


def _is_pooled(value: Any) -> bool:
    return _is_map(value) and list(value.shape[2:]) == [1, 1]


def _over_positions(node: Any) -> bool:
    axes, shape = constant(node.inputs[1]), node.inputs[0].shape
    if axes is None or shape is None or len(shape) not in (3, 4):
        return False
    return sorted(a % len(shape) for a in axes.reshape(-1).tolist()) == list(range(2, len(shape)))


def _comes_from(value: Any, total: Any) -> bool:
    """One of the nodes that make a value is `total`."""
    waiting, seen = [value.producer()], set()
    while waiting:
        node = waiting.pop()
        if node is total:
            return True
        if node is None or node in seen or node.op_type in ("ReduceSum", "GlobalAveragePool", "ReduceMean"):
            continue
        seen.add(node)
        waiting += [v.producer() for v in node.inputs if v is not None]
    return False


def rows_of_images(lowering: Any, vectors: Any, channels: int, listed: Any, need: Any, grid: Any) -> Any:
    """The vector [N, C] (or [N, C, 1, 1]) of each row's image: [K, C], or [1, C] of a single one.

    Args:
        lowering: the `Rows` in work. listed: places [K, 1] of the rows. need: the mask that they were listed by.
    """
    write = lowering.write
    flat = write("Reshape", vectors, write.integers(-1, channels))
    single = vectors.shape[0] == 1
    return flat if single else write("Gather", flat, lowering.image(listed, need, grid), axis=0)


def write_per_image(lowering: Any, step: PerImage, rows: Any, listed: Any, need: Any, grid: Any) -> Any:
    """Rows [K, C] with the vector of each row's image; arguments as of `rows_of_images`."""
    each = rows_of_images(lowering, step.vector, step.source.shape[1], listed, need, grid)
    return lowering.write(step.node.op_type, rows, each)


def write_squeeze(lowering: Any, squeeze: Squeeze, rows: Any, listed: Any, need: Any, grid: Any) -> Any:
    """Scaled rows [K, C]; the mean is taken from the rows, image by image. Arguments as of `rows_of_images`."""
    channels = squeeze.source.shape[1]
    write_total(lowering, squeeze, rows, listed, need, grid)
    each = rows_of_images(lowering, squeeze.scale, channels, listed, need, grid)
    return lowering.write("Mul", rows, each)


def write_total(
    lowering: Any, squeeze: Squeeze | Pooled, rows: Any, listed: Any, need: Any, grid: Any
) -> None:
    """Replace the sum or the means over positions by those over the rows; arguments as of `rows_of_images`."""
    from dynaconv.export import bins, tables

    write, channels, parts = lowering.write, squeeze.source.shape[1], bins.bins_of(squeeze.total)
    member, flat = lowering.member(listed, need, grid), write("Reshape", listed, write.integers(-1))
    if squeeze.mask is not None and squeeze.mask is not need and list(squeeze.mask.shape[2:]) != [1, 1]:
        # The list holds more than the open positions: what a later convolution reads, too.
        open_ = write("Reshape", squeeze.mask, write.integers(-1))
        member = write("Mul", member, write("Gather", open_, flat))
    area = tables.length(write, tables.multiply(write, grid.height, grid.width))
    if squeeze.total.op_type == BINNED:
        shares = write("Gather", bins.shares(write, grid, parts), write("Mod", flat, area), axis=0)
        # [N, bins, K] times [K, C].
        weights = write(
            "Mul", write("Unsqueeze", member, write.integers(1)), write("Transpose", shares, perm=(1, 0))
        )
        total = write("Transpose", write("MatMul", weights, rows), perm=(0, 2, 1))
    else:
        total = write("MatMul", member, rows)
        if squeeze.mask is None:
            total = write("Div", total, write("Cast", area, to=1))
    old = squeeze.total.outputs[0]
    shape = write.constant(np.array([-1, channels, *parts][: len(old.shape)]))
    old.replace_all_uses_with(write("Reshape", total, shape, like=old))
