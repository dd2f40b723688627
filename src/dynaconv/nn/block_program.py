"""A residual block as a list of operations: what always runs, what runs under the mask, what follows the addition.

Such a program is made by tracing a block (`dynaconv.convert.structure`). It holds paths and functions but no tensors,
so it is copied and pickled with the block, and follows its parameters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.spatial_mask import SpatialMask
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import dilate

INPUT = "x"
NCHW = (2, 3)


@dataclass(frozen=True)
class Ref:
    """The value of another operation inside arguments; "x" is the block's input."""

    name: str


@dataclass(frozen=True, eq=False)
class Op:
    """One operation of a block.

    role: "window" (a position reads its neighbours: convolution, pooling window, padding), "local" (a position reads
        itself), "mean" or "norm" (over all positions), "image" (on what such a mean gave), "number" (shapes),
        "constant" (reads no feature map), "mixing" (any other map from maps, only beside the mask),
        "opaque" (no map, on the way to such a one: matrices of attention).
    call, target: "module" and its path, "function" and itself, "method" and its name, "attribute" and its path.
    layout: the two axes of the result that are the position: (2, 3) for [N, C, h, w], (1, 2) for [N, h, w, C]; () for
        what has no positions; one layout each where the result is a tuple. Of a mean: that of what it averages.
    shape: of the result for some input (batch and grid vary).
    geometry, mode: of a window; mode says how positions outside the map read ("zeros" or one of `F.pad`'s). A mixing
        operation that keeps the grid has the geometry that does.
    weights, bias: of one output position; path: the module that the multiply-adds are counted for.
    """

    name: str
    role: str
    call: str
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    layout: tuple = ()
    shape: tuple[int, ...] = ()
    geometry: Geometry | None = None
    mode: str = "zeros"
    weights: int = 0
    bias: int = 0
    path: str = ""

    @property
    def sources(self) -> list[str]:
        """Names of the values that it reads."""
        return [ref.name for ref in refs((self.args, self.kwargs))]


@dataclass(frozen=True, eq=False)
class Fused:
    """A convolution and what follows it and nobody else reads: batch norm, activation (names of operations)."""

    conv: str
    norm: str | None = None
    act: str | None = None


@dataclass(frozen=True, eq=False)
class Program:
    """A block: `before` always runs, `branch` where the mask needs it, `after` on the joined map.

    The joined map, known to `after` as `joined`, is shortcut + M * branch; where `replaces`, it is the branch at open
    positions and the shortcut at closed ones.
    """

    before: tuple[Op, ...]
    branch: tuple[Op, ...]
    after: tuple[Op, ...]
    shortcut: str
    result: str
    joined: str
    output: str
    replaces: bool
    in_channels: int
    stride: int
    fused: tuple[Fused, ...] = ()

    @property
    def convolutions(self) -> list[Op]:
        """Operations of the branch that multiply."""
        return [op for op in self.branch if op.weights]

    @property
    def pools(self) -> bool:
        """Something in the branch depends on which positions were computed."""
        return any(op.role in ("mean", "norm") for op in self.branch)


def refs(tree: Any) -> Iterator[Ref]:
    """All references inside arguments."""
    if isinstance(tree, Ref):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from refs(value)
    elif isinstance(tree, (tuple, list)):
        for value in tree:
            yield from refs(value)
    elif isinstance(tree, slice):
        yield from refs((tree.start, tree.stop, tree.step))


def filled(tree: Any, values: Mapping[str, Any]) -> Any:
    """Arguments with values in the place of references."""
    if isinstance(tree, Ref):
        return values[tree.name]
    if isinstance(tree, tuple):
        return tuple([filled(value, values) for value in tree])
    if isinstance(tree, list):
        return [filled(value, values) for value in tree]
    if isinstance(tree, dict):
        return {key: filled(value, values) for key, value in tree.items()}
    if isinstance(tree, slice):
        return slice(filled(tree.start, values), filled(tree.stop, values), filled(tree.step, values))
    return tree


def evaluate(op: Op, block: nn.Module, values: Mapping[str, Any]) -> Any:
    """The operation's result."""
    if op.call == "attribute":
        owner, _, name = op.target.rpartition(".")
        return getattr(block.get_submodule(owner), name)
    args, kwargs = filled(op.args, values), filled(op.kwargs, values)
    if op.call == "module":
        return block.get_submodule(op.target)(*args, **kwargs)
    if op.call == "method":
        return getattr(args[0], op.target)(*args[1:], **kwargs)
    return op.target(*args, **kwargs)


def grids(program: Program, size: Sequence[int]) -> dict[str, tuple[int, int]]:
    """The grid (h, w) of every map before and in the branch, for an input of `size` = (H, W).

    What lies behind an operation that mixes positions and changes the grid has none; the branch reads nothing of that.
    """
    found: dict[str, tuple[int, int]] = {INPUT: (size[0], size[1])}
    for op in (*program.before, *program.branch):
        if op.role in ("window", "local", "opaque") or (op.role == "mixing" and op.geometry is not None):
            source = next((found[name] for name in op.sources if name in found), None)
            if source is not None:
                found[op.name] = source if op.geometry is None else op.geometry.output_size(source)
    return found


def branch_needs(
    program: Program, mask: Tensor, size: Sequence[int], gradient: str = "none"
) -> dict[str, Tensor]:
    """The mask that every operation of the branch runs on, by name; mask [N, 1, h, w] is the last one's.

    Need is walked backwards: a window needs what it reads, anything else leaves it unchanged, a value with several
    readers needs the union. A mean over positions sees those where its result is used.

    Source: arXiv 1912.03203, section 3.3, generalised to any graph.
    """
    # Tracing knows no as_subclass, and the masks that it sees are no SpatialMask.
    needs = {program.result: mask.as_subclass(Tensor) if isinstance(mask, SpatialMask) else mask}
    where = grids(program, size)
    inside = {op.name: op for op in program.branch}
    for op in reversed(program.branch):
        need = needs.get(op.name)
        if need is None or op.role in ("number", "constant"):
            continue
        for name in op.sources:
            source = inside.get(name)
            if source is None or source.role in ("number", "constant"):
                continue
            read = need if op.geometry is None else _read(need, where[name], op, gradient)
            if name in where and tuple(read.shape[2:]) != where[name]:
                # A mean that is used on another grid: it does not say which of its positions matter.
                continue
            other = needs.get(name)
            if other is None:
                needs[name] = read
            elif other is not read and other.shape == read.shape:
                needs[name] = torch.maximum(other, read)
    return needs


def _read(need: Tensor, size: tuple[int, int], op: Op, gradient: str) -> Tensor:
    geometry = op.geometry
    assert geometry is not None, "only windows read neighbours"
    if geometry.pointwise:
        return need
    (h, w), (ph, pw) = size, geometry.padding
    bordered = op.mode != "zeros" and (ph, pw) != (0, 0)
    read = dilate(
        need,
        (h + 2 * ph, w + 2 * pw) if bordered else size,
        kernel_size=geometry.kernel,
        stride=geometry.stride,
        padding=(0, 0) if bordered else (ph, pw),
        dilation=geometry.dilation,
        gradient=gradient,
    )
    return _folded(read, size, bordered_rows(size, (ph, pw), op.mode)) if bordered else read


def bordered_rows(size: tuple[int, int], padding: tuple[int, int], mode: str) -> Tensor:
    """The position, h * W + w, that each position of a bordered map shows: [(H + 2 ph) * (W + 2 pw)].

    Args:
        size, padding: (H, W) and (ph, pw). mode: one of `F.pad`'s.
    """
    (h, w), (ph, pw) = size, padding
    index = torch.arange(h * w, dtype=torch.float64).view(1, 1, h, w)
    return F.pad(index, (pw, pw, ph, ph), mode=mode).long().view(-1)


def _folded(need: Tensor, size: tuple[int, int], shown: Tensor) -> Tensor:
    """Which positions of a map the needed ones of its bordered map show."""
    flat, shown = need.flatten(1), shown.to(need.device).expand(need.shape[0], -1)
    none = flat.new_zeros(flat.shape[0], size[0] * size[1])
    return none.scatter_reduce(1, shown, flat, "amax").view(-1, 1, *size)


def macs_per_position(op: Op, block: nn.Module) -> int:
    """Multiply-adds for one output position: the kernel of one sample, plus C_out for a bias."""
    if op.call != "module":
        return op.weights + op.bias
    layer = block.get_submodule(op.target)
    if isinstance(layer, DynamicConv):
        return layer.kernel_numel
    return layer.weight.numel() + (0 if layer.bias is None else layer.bias.numel())
