"""The sparse lowering: masked branches compute the open rows of all images in one product, and maps stay rows between.

A map [N, C, h, w] is held as rows [N * h * w, C] wherever something sparse made it; pointwise convolutions, additions,
activations and means that follow work on the rows, too, so that turning the layout happens where it must and once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from dynaconv.export import bins, narrow, tables
from dynaconv.export.branches import Branch
from dynaconv.export.channels import ChannelBranch
from dynaconv.export.gates import GateLogits, find_gates, write_gate
from dynaconv.export.graph import Writer, constant, only_user
from dynaconv.export.own import BINNED
from dynaconv.export.parts import (
    Pointwise,
    RoutedStage,
    Stage,
    channel_constant,
    is_static_conv,
    is_unary,
)
from dynaconv.export.regions import write_total
from dynaconv.export.stages import Listed, row_shape, run_stage
from dynaconv.export.tables import Grid


def lower(graph: Any, branches: list[Branch], images: int) -> None:
    """Rewrite the graph so that these branches skip.

    Args:
        branches: of `find_branches(graph, ...)`; those that are not in the list stay dense. images: how many it
            shall be fast for; 0 keeps `winograd` out of it.
    """
    Rows(graph, branches, images).run()


class Rows:
    """One walk over the graph, in order; what it has written is remembered and shared."""

    def __init__(self, graph: Any, branches: list[Branch], images: int) -> None:
        self.graph, self.images = graph, images
        self.ends = {branch.result.producer(): branch for branch in branches}
        self.inner = {node for branch in branches for node in branch.inner}
        self.gates = {gate.node: gate for gate in find_gates(graph)}
        self.listed = {branch.source for branch in branches if not isinstance(branch, ChannelBranch)}
        # Projections whose only reader is the addition of a branch; rows that still lack their bias -> the bias.
        self.shortcuts = {conv for conv in map(_shortcut_conv, branches) if conv is not None}
        self.without_bias: dict[Any, Any] = {}
        # Of values that something on rows has made: their rows. Of others: rows that were made of the map.
        self.native: dict[Any, Any] = {}
        self.turned: dict[Any, Any] = {}
        self.grids: dict[Any, Grid] = {}
        self.shared: dict[Any, Any] = {}
        self.constants: dict[Any, Any] = {}
        self.write = Writer(graph, None, self.constants)

    def run(self) -> None:
        """Rewrite."""
        for node in list(self.graph):
            self.write = Writer(self.graph, node, self.constants)
            if node in self.ends:
                self._branch(self.ends[node])
            elif node in self.gates:
                self._gate(self.gates[node])
            elif node not in self.inner and node.inputs:
                self._follow(node)

    def once(self, key: tuple[Any, ...], make: Any) -> Any:
        """What was written for this key, or what `make` writes now."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def rows(self, value: Any) -> Any:
        """A map [N, C, h, w] as rows."""
        if value in self.native:
            return self.native[value]
        if value not in self.turned:
            inside_out = self.write("Transpose", value, perm=(0, 2, 3, 1))
            shape = self.write.integers(-1, value.shape[1])
            self.turned[value] = self.write("Reshape", inside_out, shape)
        return self.turned[value]

    def grid(self, value: Any) -> Grid:
        """Sizes of a map."""
        if value not in self.grids:
            sizes = [
                d if isinstance(d, int) else self._size(value, axis) for axis, d in enumerate(value.shape)
            ]
            batch = sizes[0] if not isinstance(sizes[0], int) else self.write.integers(sizes[0])
            self.grids[value] = Grid(batch, sizes[2], sizes[3])
        return self.grids[value]

    def _size(self, value: Any, axis: int) -> Any:
        if axis > 0:
            return self.write("Shape", value, start=axis, end=axis + 1)
        # Every map has the batch of the images.
        image = self.graph.inputs[0]
        return self.once(("batch",), lambda: self.write("Shape", image, start=0, end=1))

    def keep(self, value: Any, rows: Any, grid: Grid) -> None:
        """`rows` are what `value` was: its readers get the map made of them, unless they read rows."""
        shape = tables.shape_of(self.write, grid, value.shape[1])
        whole = self.write("Reshape", rows, shape)
        turned = self.write("Transpose", whole, perm=(0, 3, 1, 2), like=value)
        value.replace_all_uses_with(turned, replace_graph_outputs=True)
        if value.name and turned.is_graph_output():
            value.name, turned.name = f"{value.name}.dense", value.name
        self.native[turned], self.grids[turned] = rows, grid

    # Masked branches

    def _branch(self, branch: Branch) -> None:
        grids = self._grids(branch)
        if isinstance(branch, ChannelBranch):
            y = narrow.run_branch(self, branch, grids)
            self.keep(branch.result, self._join(branch, y, grids[-1]), grids[-1])
            return
        mask, grid = self._on_grid(branch, grids[-1]), grids[-1]
        needs = [mask]
        for i in range(len(branch.stages) - 1, 0, -1):
            needs.insert(0, self._need(needs[0], branch.stages[i], *grids[i : i + 2]))
        x: Any = self.rows(branch.source)
        before = None
        for stage, need, inside, outside in zip(branch.stages, needs, grids[:-1], grids[1:], strict=True):
            if isinstance(x, Listed) and isinstance(stage, RoutedStage) and stage.pooled is not None:
                write_total(self, stage.pooled, x.rows, x.places, before, inside)
            places, before = self.listing(need), need
            x = Listed(run_stage(self, stage, x, inside, outside, places, need), places, need)
        rows = self._join(branch, x, grid)
        self.keep(branch.result, rows, grid)

    def _on_grid(self, branch: Branch, grid: Grid) -> Any:
        """The mask [N, 1, h, w]; one decision for a whole image is spread over its positions."""
        mask, out = branch.mask, branch.product.outputs[0]
        if list(map(str, mask.shape[2:])) == list(map(str, out.shape[2:])):
            return mask

        def spread() -> Any:
            sizes = tables.shape_of(self.write, grid, front=(grid.batch, 1, grid.height, grid.width))
            return self.write("Expand", mask, sizes, shape=[mask.shape[0], 1, *out.shape[2:]])

        return self.once(("spread", mask, *grid.key), spread)

    def _grids(self, branch: Branch) -> list[Grid]:
        """Grid of the branch's input and of every convolution's output."""
        found = [self.grid(branch.source)]
        for stage in branch.stages:
            found.append(self._behind(stage, found[-1]))
        return found

    def _behind(self, stage: Stage, grid: Grid) -> Grid:
        """Grid of a convolution's output."""
        if stage.pointwise:
            return grid
        key = ("behind", stage.kernel, stage.stride, stage.pads, stage.dilation, *grid.key)
        return self.once(key, lambda: tables.output_grid(self.write, stage, grid))

    def _need(self, mask: Any, stage: Stage, inside: Grid, outside: Grid) -> Any:
        if stage.pointwise:
            return mask
        key = ("need", mask, stage.kernel, stage.stride, stage.pads, stage.dilation, *inside.key)
        return self.once(key, lambda: tables.needed(self.write, mask, stage, inside, outside))

    def listing(self, mask: Any) -> Any:
        """Open rows of a mask, [K, 1]."""
        return self.once(("list", mask), lambda: tables.open_rows(self.write, mask))

    def index(self, mask: Any, strict: bool = False) -> Any:
        """Where each position's row is in the list of a mask; see `tables.ranks`."""
        return self.once(("index", mask, strict), lambda: tables.ranks(self.write, mask, strict))

    def image(self, places: Any, need: Any, grid: Grid) -> Any:
        """The image that each listed row is of, [K]; `places` lists the mask `need` on the grid."""
        area = tables.length(self.write, tables.multiply(self.write, grid.height, grid.width))
        flat = self.write.integers(-1)
        return self.once(
            ("image", need), lambda: self.write("Div", self.write("Reshape", places, flat), area)
        )

    def member(self, places: Any, need: Any, grid: Grid) -> Any:
        """1 where a listed row is of an image, else 0: [N, K]."""
        image = self.image(places, need, grid)
        return self.once(("member", need), lambda: tables.members(self.write, image, grid.batch))

    def _join(self, branch: Branch, x: Any, grid: Grid) -> Any:
        """act(shortcut + what the branch gave): rows of the whole map, or `Listed` ones."""
        if branch.shortcut is None:
            if not isinstance(x, Listed):
                return x
            zeros = self.write("ConstantOfShape", row_shape(self.write, grid, branch.channels))
            return self.write("ScatterND", zeros, x.places, x.rows)
        self._project_shortcut(branch)
        shortcut = self.rows(branch.shortcut)
        if isinstance(x, Listed):
            # Faster than gathering the shortcut's rows, adding, and writing back.
            y = self.write("ScatterND", shortcut, x.places, x.rows, reduction="add")
        else:
            y = self.write("Add", shortcut, x)
        if shortcut in self.without_bias:
            y = self.write("Add", y, self.without_bias[shortcut])
        return y if branch.act is None else self._apply(Pointwise(branch.act), y)

    def _project_shortcut(self, branch: Branch) -> None:
        """A projection of the map that the branch reads works on the rows that were made for the branch."""
        conv = branch.shortcut.producer()
        if branch.shortcut not in self.native and conv is not None and conv.inputs[0] is branch.source:
            if _projects(conv):
                self._project(conv)

    def _apply(self, step: Pointwise, rows: Any) -> Any:
        return apply_pointwise(self.write, step, rows)

    # What follows on rows

    def _gate(self, gate: GateLogits) -> None:
        # A branch that lists rows of the same map turns it anyway.
        turned = gate.source in self.native or gate.source in self.listed
        rows = self.rows(gate.source) if turned else None
        write_gate(self.write, gate, rows, self.grid(gate.source))

    def _follow(self, node: Any) -> None:
        """Work on rows where the inputs are rows already."""
        value = node.inputs[0]
        if node.op_type == "Conv" and value in self.native and _projects(node):
            self._project(node)
        elif is_unary(node) and value in self.native:
            self._map_rows(node, value, Pointwise(node))
        elif channel_constant(node) is not None:
            value = node.inputs[1 - channel_constant(node)]
            if value in self.native:
                self._map_rows(node, value, Pointwise(node))
        elif (
            node.op_type in ("Add", "Mul")
            and all(v in self.native for v in node.inputs)
            and _same_shape(*node.inputs)
        ):
            rows = self.write(node.op_type, *(self.native[v] for v in node.inputs))
            self.keep(node.outputs[0], rows, self.grid(value))
        elif node.op_type == "GlobalAveragePool" and value in self.native:
            self._average(node)
        elif node.op_type == BINNED and value in self.native:
            self._average_parts(node)

    def _map_rows(self, node: Any, value: Any, step: Pointwise) -> None:
        if node.outputs[0].shape is None:
            node.outputs[0].shape = value.shape
        self.keep(node.outputs[0], self._apply(step, self.native[value]), self.grid(value))

    def _project(self, node: Any) -> None:
        """A 1 x 1 convolution, possibly strided."""
        stage, x = Stage(node, []), self.rows(node.inputs[0])
        inside = self.grid(node.inputs[0])
        outside = self._behind(stage, inside)
        if stage.stride != (1, 1):
            key = ("every", stage.stride, *inside.key)
            table = self.once(key, lambda: tables.tap_table(self.write, stage, inside, outside))
            x = self.write("GatherND", x, table)
        weight = self.write.constant(stage.weight[:, :, 0, 0].T, f"{node.inputs[1].name}.rows")
        bias = None if stage.bias is None else self.write.constant(stage.bias)
        if bias is None or node in self.shortcuts:
            # ONNX Runtime writes a product's bias into all rows first, with one thread; that takes as long again.
            y = self.write("MatMul", x, weight)
            self.without_bias |= {} if bias is None else {y: bias}
        else:
            y = self.write("Gemm", x, weight, bias)
        self.keep(node.outputs[0], y, outside)

    def _average(self, node: Any) -> None:
        value, y = node.inputs[0], node.outputs[0]
        grid, channels = self.grid(value), value.shape[1]
        positions = tables.multiply(self.write, grid.height, grid.width)
        shape = tables.shape_of(self.write, grid, front=(-1, positions, channels))
        whole = self.write("Reshape", self.native[value], shape)
        if isinstance(positions, int):
            # A product with equal weights: runtimes are slow at means over an axis that is not the last.
            weights = np.full((1, 1, positions), 1 / positions, np.float32)
            mean = self.write("MatMul", self.write.constant(weights), whole)
        else:
            mean = self.write("ReduceMean", whole, self.write.integers(1), keepdims=0)
        back = self.write("Reshape", mean, self.write.integers(-1, channels, 1, 1), like=y)
        y.replace_all_uses_with(back, replace_graph_outputs=True)

    def _average_parts(self, node: Any) -> None:
        (value, _), y, parts = node.inputs, node.outputs[0], bins.bins_of(node)
        grid, channels = self.grid(value), value.shape[1]
        positions = tables.multiply(self.write, grid.height, grid.width)
        shape = tables.shape_of(self.write, grid, front=(-1, positions, channels))
        shares = self.write("Transpose", bins.shares(self.write, grid, parts), perm=(1, 0))
        means = self.write("MatMul", shares, self.write("Reshape", self.native[value], shape))
        turned = self.write("Transpose", means, perm=(0, 2, 1))
        back = self.write("Reshape", turned, self.write.integers(-1, channels, *parts), like=y)
        y.replace_all_uses_with(back)


def apply_pointwise(write: Writer, step: Pointwise, rows: Any) -> Any:
    """The same activation, scale or shift on rows [K, C]."""
    node = step.node
    if step.silu:
        return write("Mul", rows, write("Sigmoid", rows))
    place = 1 if node.op_type == "PRelu" else channel_constant(node)
    if place is None:
        attributes = {name: a.value for name, a in node.attributes.items()}
        return write(node.op_type, rows, *node.inputs[1:], **attributes)
    vector = write.constant(constant(node.inputs[place]).reshape(-1))
    return write(node.op_type, *((vector, rows) if place == 0 else (rows, vector)))


def _shortcut_conv(branch: Branch) -> Any:
    """The projection that makes a branch's shortcut and nothing else."""
    conv = None if branch.shortcut is None else branch.shortcut.producer()
    alone = conv is not None and only_user(branch.shortcut) is not None
    return conv if alone and _projects(conv) else None


def _projects(node: Any) -> bool:
    stage = Stage(node, []) if is_static_conv(node) else None
    return stage is not None and stage.kernel == (1, 1) and stage.groups == 1 and not any(stage.pads)


def _same_shape(a: Any, b: Any) -> bool:
    return (
        a.shape is not None
        and b.shape is not None
        and list(map(str, a.shape))[1:] == list(map(str, b.shape))[1:]
    )
