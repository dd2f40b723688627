"""Running a block's program only where its mask needs it: compact rows, one for each computed position.

All images' rows of one mask lie in one matrix. Operations that treat every position by itself see the rows as a batch
of images of one pixel, so that they run unchanged; convolutions gather their taps (`dynaconv.ops._gemm_conv`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.nn._fold import activation_name, fold_conv, norm_activation
from dynaconv.nn.block_program import (
    INPUT,
    NCHW,
    Op,
    Program,
    bordered_rows,
    branch_needs,
    evaluate,
    filled,
    grids,
)
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_kernels import coefficients
from dynaconv.nn.masked_program import run_after, run_before
from dynaconv.ops import ConvSpec, _rows
from dynaconv.ops._conv import Geometry
from dynaconv.ops._gemm_conv import conv_rows, pack_weight

Packed = dict[str, tuple[ConvSpec, Tensor]]


def pack_program(program: Program, block: nn.Module) -> Packed:
    """Folded and reordered weights of the branch's layers, by the name of their operation."""
    made = {op.name: op for op in program.branch}

    def layer(name: str | None) -> nn.Module | None:
        return None if name is None else block.get_submodule(made[name].target)

    found: Packed = {}
    for fused in program.fused:
        if made[fused.conv].call != "module":
            continue
        conv, norm, act = (layer(name) for name in (fused.conv, fused.norm, fused.act))
        if isinstance(conv, nn.Linear):
            name = activation_name(act)
            assert name is not None
            weight = conv.weight[:, :, None, None]
            spec = ConvSpec(weight, conv.bias, (1, 1), (0, 0), (1, 1), 1, name)
        else:
            spec = fold_conv(conv, norm, act if norm_activation(norm) is None or act is not None else None)
        found[fused.conv] = spec, pack_weight(spec)
    return found


def run_rows(
    program: Program, block: nn.Module, x: Tensor, mask: Tensor, shared: dict[str, Tensor], packed: Packed
) -> Tensor:
    """Same values as `run_dense`, computing the branch at the positions that the mask needs; without gradient.

    Args:
        x: [N, C, H, W]. mask: [N, 1, h, w]. shared: coefficients of a router that serves the block, by layer.
        packed: from `pack_program`.
    """
    values = run_before(program, block, x, shared)
    shortcut = values[program.shortcut]
    rows = _rows.active_rows(mask)
    joined = shortcut
    if rows.numel():
        branch = _Branch(program, block, x, mask, values, shared, packed).run()
        n, c, h, w = shortcut.shape
        after = _rows.channels_last_rows(shortcut).clone()
        after[rows] = branch if program.replaces else after.index_select(0, rows) + branch
        joined = after.view(n, h, w, c).permute(0, 3, 1, 2)
    elif program.after and program.joined != program.output:
        # What follows may work in place.
        joined = shortcut.clone()
    return run_after(program, block, values, joined)


class _Branch:
    """Values of one pass: rows [a, ...] of every map in the branch, for the positions of its need."""

    def __init__(self, program, block, x, mask, dense, shared, packed) -> None:
        self.program, self.block, self.shared, self.packed = program, block, shared, packed
        self.images = x.shape[0]
        self.dense: dict[str, Any] = dense
        self.needs = branch_needs(program, mask, x.shape[2:])
        self.grids = grids(program, (x.shape[2], x.shape[3]))
        self.ops = {op.name: op for op in (*program.before, *program.branch)}
        self.values: dict[str, Any] = {}
        self.done: set[str] = set()
        self._lists: dict[int, Tensor] = {}

    def run(self) -> Tensor:
        """The branch's result at the open positions, [a, C]."""
        fused = {f.conv: f for f in self.program.fused if f.conv in self.packed}
        for op in self.program.branch:
            if op.name in self.done:
                continue
            if op.weights and op.name in fused:
                value = self._convolve(op, *self.packed[op.name])
                for name in (op.name, fused[op.name].norm, fused[op.name].act):
                    if name is not None:
                        self.values[name] = value
                        self.done.add(name)
            elif op.role == "window":
                self.values[op.name] = self._window(op)
            elif op.role == "local" and op.name in self.needs:
                self.values[op.name] = evaluate(op, self.block, self._pixels(op))
            elif op.role in ("mean", "norm"):
                self.values[op.name] = self._pool(op)
            elif op.role in ("image", "constant"):
                self.values[op.name] = evaluate(op, self.block, self._whole(op))
        return self.values[self.program.result].flatten(1)

    # Rows and positions

    def _rows_of(self, need: Tensor) -> Tensor:
        if id(need) not in self._lists:
            self._lists[id(need)] = _rows.active_rows(need)
        return self._lists[id(need)]

    def _image_of(self, name: str, need: Tensor) -> Tensor:
        h, w = self.grids[name]
        return self._rows_of(need) // (h * w)

    def _place(self, need: Tensor) -> Tensor:
        """For every position, its row among those of `need`; the row behind the last where it has none."""
        rows = self._rows_of(need)
        place = torch.full((need.numel() + 1,), rows.numel(), dtype=torch.int64)
        place[rows] = torch.arange(rows.numel(), dtype=torch.int64)
        return place

    def _at(self, name: str, need: Tensor) -> Any:
        """A map's values at the positions of `need`, as images of one pixel."""
        if name in self.values:
            own, value = self.needs[name], self.values[name]
            if own is need:
                return value
            index = self._place(own).index_select(0, self._rows_of(need))
            if isinstance(value, Tensor):
                return value.index_select(0, index)
            return type(value)(v.index_select(0, index) for v in value)
        rows = _rows.channels_last_rows(self.dense[name]).index_select(0, self._rows_of(need))
        return rows[:, :, None, None]

    def _pixels(self, op: Op) -> dict[str, Any]:
        """What a local operation reads, every position as an image of its own."""
        return {name: self._pixel_value(name, self.needs[op.name], op) for name in op.sources}

    def _pixel_value(self, name: str, need: Tensor, op: Op) -> Any:
        role = "local" if name == INPUT else self.ops[name].role
        if role in ("window", "local"):
            return self._at(name, need)
        if role in ("mean", "norm", "image"):
            value = self.values[name] if name in self.values else self.dense[name]
            return value.index_select(0, self._image_of(op.name, need))
        if role == "number":
            # Sizes of a map are those of its pixels here.
            source = self.ops[name]
            inner = {s: self._pixel_value(s, need, op) for s in source.sources}
            return evaluate(source, self.block, inner)
        return self.values[name] if name in self.values else self.dense[name]

    def _whole(self, op: Op) -> dict[str, Any]:
        """What an operation on one value an image reads."""
        return {name: self._whole_value(name) for name in op.sources}

    def _whole_value(self, name: str) -> Any:
        if name in self.dense:
            return self.dense[name]
        source = self.ops[name]
        if source.role == "number":
            return evaluate(source, self.block, self._whole(source))
        if source.role in ("window", "local"):
            # Only its sizes are read.
            shape = list(source.shape)
            shape[0] = self.images
            for axis, size in zip(source.layout, self.grids[name], strict=True):
                shape[axis] = size
            return torch.empty(shape, device="meta")
        return self.values[name]

    # Operations

    def _source(self, op: Op) -> tuple[Tensor, Tensor | None]:
        """Rows to read from, a zero row at the end, and which of them each position reads (None: its own)."""
        source, need, geometry = op.sources[0], self.needs[op.name], op.geometry
        inside = source in self.values
        if geometry is None or (geometry.pointwise and inside):
            return self._at(source, need).flatten(1), None
        taps = _taps(self.images, self.grids[source], geometry, op.mode).index_select(0, self._rows_of(need))
        if not inside:
            return _rows.rows_and_zero(self.dense[source]), taps
        value = self.values[source].flatten(1)
        place = self._place(self.needs[source])
        value = torch.cat((value, value.new_zeros(1, value.shape[1])))
        return value, place.index_select(0, taps.view(-1)).view_as(taps)

    def _convolve(self, op: Op, spec: ConvSpec, packed: Tensor) -> Tensor:
        rows, taps = self._source(op)
        out = rows.new_empty(self._rows_of(self.needs[op.name]).numel(), spec.weight.shape[0])
        conv_rows(rows, taps, packed, spec, out)
        return out[:, :, None, None] if op.layout == NCHW else out[:, None, None, :]

    def _window(self, op: Op) -> Tensor:
        layer = self.block.get_submodule(op.target) if op.call == "module" else None
        if isinstance(layer, DynamicConv):
            return self._dynamic(op, layer)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            spec = fold_conv(layer, None, None)
            return self._convolve(op, spec, pack_weight(spec))
        if isinstance(layer, nn.AvgPool2d):
            spec = self._averaging(op)
            return self._convolve(op, spec, pack_weight(spec))
        if not op.weights:
            rows, taps = self._source(op)
            return (rows if taps is None else rows.index_select(0, taps[:, 0]))[:, :, None, None]
        spec = self._functional(op)
        return self._convolve(op, spec, pack_weight(spec))

    def _averaging(self, op: Op) -> ConvSpec:
        """An average over windows as a depthwise convolution."""
        assert op.geometry is not None
        channels, (kh, kw) = op.shape[1], op.geometry.kernel
        some = self.dense[INPUT]
        weight = torch.full((channels, 1, kh, kw), 1 / (kh * kw), dtype=some.dtype, device=some.device)
        return ConvSpec(weight, None, op.geometry.stride, (0, 0), (1, 1), channels)

    def _functional(self, op: Op) -> ConvSpec:
        """F.conv2d with a weight that reads no picture."""
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        values = self._whole(op)
        call = {**dict(zip(names, filled(op.args, values), strict=False)), **filled(op.kwargs, values)}
        moves = op.geometry.stride, op.geometry.padding, op.geometry.dilation
        return ConvSpec(call["weight"], call.get("bias"), *moves, call.get("groups", 1))

    def _dynamic(self, op: Op, conv: DynamicConv) -> Tensor:
        """Each image with its own kernel."""
        source, need = op.sources[0], self.needs[op.name]
        hidden, open_ = self._dense_map(source), self.needs.get(source) if source in self.values else None
        weights, biases = conv.kernels(coefficients(conv, op.target, self.shared, hidden, open_))
        rows, taps = self._source(op)
        counts = torch.bincount(self._image_of(op.name, need), minlength=self.images).tolist()
        out, start = rows.new_empty(sum(counts), conv.out_channels), 0
        for i, count in enumerate(counts):
            bias = biases[i] if biases is not None and biases.dim() == 2 else biases
            spec = ConvSpec(weights[i], bias, conv.stride, op.geometry.padding, conv.dilation, conv.groups)
            mine = slice(start, start + count)
            read = rows[mine] if taps is None else rows
            conv_rows(read, None if taps is None else taps[mine], pack_weight(spec), spec, out[mine])
            start += count
        return out[:, :, None, None]

    def _dense_map(self, name: str) -> Tensor:
        """A map [N, C, h, w] with zeros where it was not computed."""
        if name not in self.values:
            return self.dense[name]
        value, (h, w) = self.values[name].flatten(1), self.grids[name]
        full = value.new_zeros(self.images * h * w, value.shape[1])
        full[self._rows_of(self.needs[name])] = value
        return full.view(self.images, h, w, -1).permute(0, 3, 1, 2)

    def _pool(self, op: Op) -> Tensor:
        source = op.sources[0]
        if source not in self.values:
            return evaluate(op, self.block, self.dense)
        rows, need = self.values[source].flatten(1), self.needs[source]
        image = self._image_of(source, need)
        total = rows.new_zeros(self.images, rows.shape[1])
        total.index_add_(0, image, rows if op.role == "mean" else rows.square())
        if op.role == "norm":
            pooled = total.sqrt()
        else:
            pooled = total / torch.bincount(image, minlength=self.images).clamp(min=1)[:, None]
        return pooled.reshape(self.images, *op.shape[1:])


def _taps(n: int, size: tuple[int, int], geometry: Geometry, mode: str) -> Tensor:
    """Input rows that each output position reads; outside of the map the row behind the last, or what `mode` says."""
    if mode == "zeros":
        return _rows.tap_table(n, size, geometry)
    (h, w), (ph, pw) = size, geometry.padding
    inner = replace(geometry, padding=(0, 0))
    index = bordered_rows(size, geometry.padding, mode)
    plane = _rows.tap_table(1, (h + 2 * ph, w + 2 * pw), inner)
    one = index.index_select(0, plane.view(-1)).view_as(plane)
    return (one + torch.arange(n)[:, None, None] * (h * w)).view(-1, one.shape[1])
