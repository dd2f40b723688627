"""Finding out what each operation of a traced block does with positions, by trying it.

A block runs on small random maps twice: as they are, and cut into pixels, each an image of its own. An operation that
gives the same both ways is local; convolutions and pooling windows are known by their geometry; whatever else equals
the mean or the norm over all positions is a pool. Nothing is decided by the name of a class.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from dynaconv.convert.probe_layers import OtherWidth, Unsupported, known_layer
from dynaconv.nn.block_program import INPUT, NCHW, Op, Ref, filled
from dynaconv.ops._conv import Geometry

# Batch and grid of the trial, all different, with odd sides.
IMAGES, GRID = 3, (9, 7)
_SAME_GRID = Geometry((1, 1), (1, 1), (0, 0), (1, 1))
POOLED = ("mean", "norm", "image")
_CALLS = {
    "call_module": "module", "call_function": "function", "call_method": "method", "get_attr": "attribute",
}  # fmt: skip
_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError)
_Run = Callable[[Mapping[str, Any]], Any]


class Probe:
    """Roles of a graph's nodes for an input of `channels`.

    ops: the operations by name, in order. refused: why an operation has no role, for those and what reads them.
    mixing: why an operation cannot be under a mask, though it may be beside it. What is refused may also be part of
        what always runs where it has a role, "opaque".

    Raises:
        OtherWidth: the input cannot have this many channels.
    """

    def __init__(self, block: nn.Module, graph: fx.Graph, channels: int) -> None:
        self.block = block
        self.ops: dict[str, Op] = {}
        self.refused: dict[str, str] = {}
        self.grid: dict[str, tuple[int, int]] = {}
        self.names: dict[fx.Node, str] = {}
        self.whole: dict[str, Any] = {}
        self.mixing: dict[str, str] = {}
        self._pixels: dict[str, Any] = {}
        self._written: dict[str, str] = {}
        self._generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for node in graph.nodes:
                if node.op == "placeholder":
                    self.names[node] = INPUT
                    self.put_map(INPUT, self.random(IMAGES, channels, *GRID), NCHW, GRID)
                elif node.op in _CALLS:
                    self.names[node] = node.name
                    self._visit(node)

    def layout(self, name: str) -> tuple:
        """Position axes of a value, () when it has none."""
        if name == INPUT:
            return NCHW
        op = self.ops.get(name)
        return op.layout if op is not None and op.role in ("window", "local", "mixing") else ()

    def channels(self, name: str) -> int:
        """Channels of a map [N, C, h, w]."""
        return self.whole[name].shape[1]

    def is_pooled(self, name: str) -> bool:
        """The value is one for each image."""
        return name in self.ops and self.ops[name].role in POOLED

    def random(self, *shape: int) -> Tensor:
        """A trial value."""
        return torch.randn(*shape, generator=self._generator)

    def put_map(self, name: str, whole: Tensor, layout: tuple, grid: tuple[int, int]) -> None:
        """Set the trial value of a map."""
        self.whole[name], self._pixels[name], self.grid[name] = whole, _cut(whole, layout), grid

    def put(self, op: Op, **found: Any) -> None:
        """Keep an operation with what was found out about it."""
        value = self.whole.get(op.name)
        shape = tuple(value.shape) if isinstance(value, Tensor) else ()
        self.ops[op.name] = Op(**{**vars(op), "shape": shape, **found})

    def _visit(self, node: fx.Node) -> None:
        args, kwargs = (_plain(t, self.names) for t in (node.args, node.kwargs))
        op = Op(node.name, "local", _CALLS[node.op], node.target, args, kwargs, path=_owner(node))
        try:
            for source in op.sources:
                if source in self.refused:
                    raise Unsupported(self.refused[source])
                if op.target is operator.getitem and len(op.args) > 1 and isinstance(op.args[1], str):
                    raise Unsupported(f"its forward takes {op.args[1]!r} out of a dictionary")
                if source in self._written:
                    raise Unsupported(f"{self._written[source]} changes a map that something else reads, too")
            maps = [name for name in op.sources if self.layout(name)]
            if not known_layer(self, op, maps):
                self._try(op, maps)
        except Unsupported as error:
            self.refused[node.name] = str(error)
            self._beside(op)

    def _beside(self, op: Op) -> None:
        """Run what no mask can follow, since it may come before the branch; a map of the old grid ends the trouble."""
        sources = op.sources
        grid = next((self.grid[s] for s in sources if s in self.grid), None)
        if grid is None or any(s in self._written or s not in self.whole for s in sources):
            return
        if op.name not in self.whole:
            try:
                self._run(op, self._runner(op))
            except (Unsupported, *_FAILURES):
                return
        whole = self.whole[op.name]
        if (
            isinstance(whole, Tensor)
            and whole.dim() == 4
            and (len(whole), *whole.shape[2:]) == (IMAGES, *grid)
        ):
            layer = self.block.get_submodule(op.target) if op.call == "module" else None
            weights = 0 if layer is None else sum(p.numel() for p in layer.parameters())
            self._put_mixing(op, grid, self.refused.pop(op.name), weights=weights)
        else:
            self.grid[op.name] = grid
            self.put(op, role="opaque")

    def _run(self, op: Op, run: _Run) -> None:
        # A view shares its version with the map behind it, which something else may read.
        versions = {s: v._version for s, v in self.whole.items() if isinstance(v, Tensor)}
        whole = run(self.whole)
        for name, version in versions.items():
            if self.whole[name]._version != version:
                self._written[name] = spell(op)
        self.whole[op.name] = whole

    def _try(self, op: Op, maps: list[str]) -> None:
        run = self._runner(op)
        try:
            self._run(op, run)
        except _FAILURES as error:
            if maps:
                raise OtherWidth(f"{spell(op)}: {error}") from error
            raise Unsupported(f"{spell(op)}: {error}") from error
        whole = self.whole[op.name]
        if not maps:
            self._without_maps(op, run)
        elif not _has_tensors(whole):
            self._pixels[op.name] = run(self._pixels)
            self.put(op, role="number")
        else:
            self._of_maps(op, run, maps)

    def _without_maps(self, op: Op, run: _Run) -> None:
        whole = self.whole[op.name]
        if any(self.is_pooled(s) for s in op.sources):
            self._pixels[op.name] = whole
            return self.put(op, role="image")
        number = any(s in self.ops and self.ops[s].role == "number" for s in op.sources)
        self._pixels[op.name] = run(self._pixels) if number else whole
        return self.put(op, role="number" if number else "constant")

    def _of_maps(self, op: Op, run: _Run, maps: list[str]) -> None:
        grids = {self.grid[name] for name in maps}
        if len(grids) > 1:
            raise Unsupported(f"{spell(op)} joins maps of different sizes")
        grid = grids.pop()
        layout = self._local_layout(op, run, grid)
        if layout is not None:
            self.grid[op.name] = grid
            return self.put(op, layout=layout)
        role = self._pool_role(self.whole[op.name], maps[0]) if len(maps) == 1 else None
        if role is None:
            return self._mixes(op, maps[0])
        self._pixels[op.name] = self.whole[op.name]
        return self.put(op, role=role, layout=self.layout(maps[0]))

    def _mixes(self, op: Op, source: str) -> None:
        """From one picture [N, C, h, w] to another, in no way that a mask can follow."""
        whole, before, reason = self.whole[op.name], self.whole[source], f"{self._layer(op)} mixes positions"
        images = isinstance(whole, Tensor) and isinstance(before, Tensor) and whole.dim() == before.dim() == 4
        if not images or self.layout(source) != NCHW or whole.shape[0] != IMAGES:
            raise Unsupported(reason)
        self._put_mixing(op, self.grid[source], reason)

    def _layer(self, op: Op) -> str:
        """An operation in words, with the kind of a layer."""
        if op.call != "module":
            return spell(op)
        return f"{spell(op)} ({type(self.block.get_submodule(op.target)).__name__})"

    def _put_mixing(self, op: Op, before: tuple[int, int], reason: str, weights: int = 0) -> None:
        """Keep a picture [N, C, h, w] that was made from one on the grid `before`."""
        whole, self.mixing[op.name] = self.whole[op.name], reason
        grid = (whole.shape[2], whole.shape[3])
        self.put_map(op.name, whole, NCHW, grid)
        self.put(
            op, role="mixing", layout=NCHW, geometry=_SAME_GRID if grid == before else None, weights=weights
        )

    def _runner(self, op: Op) -> _Run:
        """The operation on trial values; a layer is copied first, since it may be on another device, or in training."""
        if op.call == "attribute":
            value = self._attribute(op)
            return lambda values: value
        layer = None
        if op.call == "module":
            layer = copy.deepcopy(self.block.get_submodule(op.target)).eval()
            meta = any(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
            layer = (layer.to_empty(device="cpu") if meta else layer.cpu()).float()

        def run(values: Mapping[str, Any]) -> Any:
            args, kwargs = filled(op.args, values), filled(op.kwargs, values)
            if layer is not None:
                return layer(*args, **kwargs)
            if op.call == "method":
                return getattr(args[0], op.target)(*args[1:], **kwargs)
            return op.target(*args, **kwargs)

        return run

    def _attribute(self, op: Op) -> Any:
        """A parameter as training may make it, a buffer as it is."""
        owner, _, name = op.target.rpartition(".")
        holder = self.block.get_submodule(owner)
        if not hasattr(holder, name):
            raise Unsupported("its forward makes a tensor of its own; register it as a buffer in __init__")
        value = getattr(holder, name)
        if not isinstance(value, Tensor):
            return value
        if not (isinstance(value, nn.Parameter) or value.is_meta):
            return value.detach().cpu()
        # Above zero, since a root or a logarithm may follow.
        return 0.5 + torch.rand(value.shape, generator=self._generator)

    def _local_layout(self, op: Op, run: _Run, grid: tuple[int, int]) -> tuple | None:
        """The layout of a result that is the same when every pixel is an image of its own, or None."""
        whole, values = self.whole[op.name], dict(self._pixels)
        for name in op.sources:
            if self.is_pooled(name):
                value = self.whole[name]
                if not isinstance(value, Tensor) or value.shape[:1] != (IMAGES,):
                    return None
                values[name] = value.repeat_interleave(grid[0] * grid[1], 0)
        try:
            pixels = run(values)
        except _FAILURES:
            return None
        self._pixels[op.name] = pixels
        if isinstance(whole, Tensor):
            return _layout(whole, pixels, grid)
        # A split along positions has fewer parts where there is one position.
        if not all(isinstance(w, Tensor) for w in whole) or len(pixels) != len(whole):
            return None
        each = tuple(_layout(w, p, grid) for w, p in zip(whole, pixels, strict=True))
        return None if None in each else each

    def _pool_role(self, whole: Any, name: str) -> str | None:
        """Which function of all positions of a map this is."""
        source, layout = self.whole[name], self.layout(name)
        if not isinstance(whole, Tensor) or layout not in (NCHW, (1, 2)) or source.dim() != 4:
            return None
        mean, norm = source.mean(layout), source.square().sum(layout).sqrt()
        if whole.shape[:1] != source.shape[:1] or whole.numel() != mean.numel():
            return None
        flat = whole.reshape(mean.shape)
        if torch.allclose(flat, mean, atol=1e-5):
            return "mean"
        return "norm" if torch.allclose(flat, norm, atol=1e-4) else None


def spell(op: Op) -> str:
    """An operation in words."""
    if op.call == "module":
        return f"its {op.target}"
    return f"its {op.target if isinstance(op.target, str) else getattr(op.target, '__name__', op.target)}()"


def _owner(node: fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    return stack[-1][0] if stack else ""


def _plain(tree: Any, names: Mapping[fx.Node, str]) -> Any:
    """Arguments of a graph as ordinary containers with references."""
    if isinstance(tree, fx.Node):
        return Ref(names[tree])
    if isinstance(tree, slice):
        return slice(*(_plain(v, names) for v in (tree.start, tree.stop, tree.step)))
    if isinstance(tree, dict):
        return {k: _plain(v, names) for k, v in tree.items()}
    if isinstance(tree, torch.Size):
        return tuple(tree)
    if isinstance(tree, (tuple, list)):
        kind = list if isinstance(tree, list) else tuple
        return kind(_plain(v, names) for v in tree)
    return tree


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value)
    )


def _cut(whole: Tensor, layout: tuple) -> Tensor:
    """Every pixel as an image of its own: [N * h * w, ...] with ones in the place of h and w."""
    first, second = layout
    moved = whole.movedim((first, second), (1, 2))
    flat = moved.reshape(math.prod(moved.shape[:3]), *moved.shape[3:])
    return flat.unsqueeze(first).unsqueeze(second)


def _layout(whole: Tensor, pixels: Tensor, grid: tuple[int, int]) -> tuple | None:
    """Where the position axes of `whole` are, if its pixels are `pixels`."""
    if not isinstance(pixels, Tensor):
        return None
    for first in range(1, whole.dim() - 1):
        for second in range(first + 1, whole.dim()):
            if (whole.shape[first], whole.shape[second]) == grid and whole.shape[0] == IMAGES:
                cut = _cut(whole, (first, second))
                if cut.shape == pixels.shape and torch.allclose(cut, pixels, rtol=1e-4, atol=1e-5):
                    return first, second
    return None
