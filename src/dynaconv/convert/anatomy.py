"""From a block's program to its anatomy: the kind of block, and whether it is a plain chain of convolutions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.convert.tracing import is_noise
from dynaconv.nn._fold import activation_name, norm_activation
from dynaconv.nn.block_program import INPUT, Fused, Op, Program, grids
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_block import Anatomy, Step


@dataclass(frozen=True)
class Refusal:
    """A residual block that was recognised but cannot be masked, with the reason."""

    kind: str
    reason: str


Verdict = Anatomy | Refusal | None


def anatomy_of(program: Program, block: nn.Module) -> Anatomy:
    """Steps of the branch; the program stays with it unless the steps say everything."""
    kind = _kind(program, block)
    program = replace(program, fused=tuple(_fused(program, block)))
    convs = tuple(Step(op.target) for op in program.branch if op.weights and op.call == "module")
    chain = _chain(program, block, kind)
    if chain is None:
        return Anatomy(kind, convs, program=program)
    noisy = any(_is_noise(op, block) for op in (*program.before, *program.branch, *program.after))
    return replace(chain, program=program, plain=True) if noisy else chain


def outweighs(outer: Anatomy, inner: Sequence[str]) -> bool:
    """A block's own branch has more work than the blocks `inner` (names in it), which all run before that branch."""
    program = outer.program
    if program is None:
        return False
    # Of a size that halves without rounding.
    where = grids(program, (64, 64))

    def macs(ops: Sequence[Op]) -> int:
        return sum(op.weights * math.prod(where.get(op.name, where[program.result])) for op in ops)

    def inside(ops: Sequence[Op]) -> list[Op]:
        return [op for op in ops if any(op.path == n or op.path.startswith(f"{n}.") for n in inner)]

    return not inside(program.convolutions) and macs(program.branch) > macs(inside(program.before))


def _layer(op: Op, block: nn.Module) -> nn.Module | None:
    return block.get_submodule(op.target) if op.call == "module" else None


def _is_noise(op: Op, block: nn.Module) -> bool:
    layer = _layer(op, block)
    return layer is not None and not isinstance(layer, nn.Identity) and is_noise(layer)


def _kind(program: Program, block: nn.Module) -> str:
    """A name for reports, from the shapes of the kernels."""
    if program.replaces:
        return "shuffle"
    layers = [layer for op in program.convolutions if (layer := _layer(op, block)) is not None]
    wide = [isinstance(y, nn.Linear) or tuple(y.kernel_size) == (1, 1) for y in layers]
    depthwise = [getattr(y, "groups", 1) > 1 and y.groups == y.in_channels for y in layers]
    if wide == [False, False] and not any(depthwise):
        return "basic"
    if wide == [True, False, True]:
        return "inverted_residual" if depthwise[1] else "bottleneck"
    if wide == [False, True]:
        return "depthwise_separable" if depthwise[0] else "fused_inverted_residual"
    if wide == [False, True, True] and depthwise[0]:
        return "convnext"
    return "residual"


def _readers(program: Program) -> dict[str, list[Op]]:
    found: dict[str, list[Op]] = {}
    for op in (*program.before, *program.branch, *program.after):
        for name in op.sources:
            found.setdefault(name, []).append(op)
    return found


def _following(name: str, readers: dict[str, list[Op]], block: nn.Module) -> Op | None:
    """The only reader of a value, what does nothing in evaluation left out."""
    while len(readers.get(name, ())) == 1:
        op = readers[name][0]
        layer = _layer(op, block)
        if layer is None or not is_noise(layer):
            return op
        name = op.name
    return None


def _fused(program: Program, block: nn.Module) -> list[Fused]:
    """Which batch norm and activation each convolution of the branch can take into its weights."""
    readers, found = _readers(program), []
    for op in program.convolutions:
        if isinstance(_layer(op, block), DynamicConv) or op.name == program.result:
            continue
        norm = act = None
        last = op
        after = _only_reader(last, readers)
        if after is not None and isinstance(_layer(after, block), _BatchNorm):
            inner = norm_activation(_layer(after, block))
            if inner is None or activation_name(inner) is not None:
                norm, last = after, after
        if last.name != program.result and (norm is None or norm_activation(_layer(norm, block)) is None):
            after = _only_reader(last, readers)
            layer = None if after is None else _layer(after, block)
            if (
                layer is not None
                and activation_name(layer) is not None
                and not isinstance(layer, nn.Identity)
            ):
                act = after
        found.append(Fused(op.name, norm.name if norm else None, act.name if act else None))
    return found


def _only_reader(op: Op, readers: dict[str, list[Op]]) -> Op | None:
    found = readers.get(op.name, [])
    return found[0] if len(found) == 1 else None


def _chain(program: Program, block: nn.Module, kind: str) -> Anatomy | None:
    """The anatomy of a block made of nothing but convolutions, batch norms and activations, or None."""
    if program.replaces:
        return None
    steps = _steps(program.branch, INPUT, program.result, block)
    if steps is None:
        return None
    after = [op for op in program.after if not _does_nothing(op, block)]
    if len(after) > 1 or any(activation_name(_layer(op, block) or nn.Softmax()) is None for op in after):
        return None
    shortcut = None
    if not all(_does_nothing(op, block) for op in program.before):
        shortcut = _projection(program, block)
        if shortcut is None:
            return None
    return Anatomy(kind, steps, shortcut, after[0].target if after else None)


def _does_nothing(op: Op, block: nn.Module) -> bool:
    layer = _layer(op, block)
    return layer is not None and is_noise(layer)


def _steps(ops: Sequence[Op], source: str, result: str, block: nn.Module) -> tuple[Step, ...] | None:
    """Convolutions with their norm and activation where each operation reads the one before, else None."""
    steps: list[Step] = []
    last = source
    for op in ops:
        layer = _layer(op, block)
        if layer is None or op.sources != [last] or op.mode != "zeros":
            return None
        last = op.name
        if is_noise(layer):
            continue
        if isinstance(layer, (nn.Conv2d, DynamicConv)):
            steps.append(Step(op.target))
        elif not steps:
            return None
        elif isinstance(layer, _BatchNorm) and steps[-1].norm is None and steps[-1].act is None:
            if norm_activation(layer) is not None and activation_name(norm_activation(layer)) is None:
                return None
            steps[-1] = replace(steps[-1], norm=op.target)
        elif activation_name(layer) is not None and steps[-1].act is None:
            norm = None if steps[-1].norm is None else block.get_submodule(steps[-1].norm)
            if norm_activation(norm) is not None and activation_name(norm_activation(norm)) != "none":
                return None
            steps[-1] = replace(steps[-1], act=op.target)
        else:
            return None
    return tuple(steps) if last == result else None


def _projection(program: Program, block: nn.Module) -> str | None:
    """Path of the module that is a convolution, or a convolution and a batch norm in a row, and makes the shortcut."""
    steps = _steps(program.before, INPUT, program.shortcut, block)
    if steps is None or len(steps) != 1 or steps[0].act is not None:
        return None
    if steps[0].norm is None:
        return steps[0].conv
    owner, _, _ = steps[0].conv.rpartition(".")
    if not owner or owner != steps[0].norm.rpartition(".")[0]:
        return None
    parts = [m for m in block.get_submodule(owner).children() if not isinstance(m, nn.Identity)]
    norm = block.get_submodule(steps[0].norm)
    plain = activation_name(norm_activation(norm)) == "none"
    return owner if len(parts) == 2 and parts[1] is norm and plain else None
