"""Recognising a residual block by what its forward does: a feature map plus a branch computed from it.

The forward is traced, the addition (or concatenation) that everything passes through is found, and what feeds it is
told apart: the shortcut, which always runs, and the branch, which a mask can switch off position by position.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.convert.anatomy import Refusal, Verdict, anatomy_of
from dynaconv.convert.joins import ancestors, is_concatenation, is_join, joins_of, operands_of
from dynaconv.convert.normal_form import works_in_place
from dynaconv.convert.probe_layers import OtherWidth
from dynaconv.convert.probing import GRID, Probe
from dynaconv.convert.tracing import Untraceable, modes_kept, signature, trace
from dynaconv.convert.trial import computes_the_same
from dynaconv.nn.block_program import INPUT, NCHW, Op, Program, Ref, branch_needs, grids
from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer
from dynaconv.nn.masked_block import Anatomy


def read_block(block: nn.Module) -> Verdict:
    """The anatomy of a residual block, why it cannot be masked, or None when it is no residual block.

    Found by structure: the block's own forward adds (or concatenates) two maps, one of which is computed by
    convolutions from what the block was given. The block is left as it was.
    """
    if _never(block):
        return None
    with modes_kept(block):
        block.eval()
        try:
            if not any(is_join(node) for node in trace(block, shallow=True).nodes):
                return None
            graph = trace(block)
        except Untraceable as error:
            return _untraceable(block, str(error))
        returned = _returned(graph)
        if returned is not None:
            return Refusal("residual", f"its forward returns {returned}, expected one feature map")
        joins = joins_of(graph)
        if not joins:
            return None
        unread = _unread(graph, block)
        if unread is not None:
            return Refusal("residual", f"its {unread} changes a map that is then read by another name")
        block.train()
        try:
            changes = signature(trace(block)) != signature(graph)
        except Untraceable:
            changes = True
        block.eval()
        verdict = _read(block, graph, joins)
    if changes and not (verdict is None or isinstance(verdict, Refusal)):
        return Refusal(
            verdict.kind, "its forward differs between training and evaluation; use modules for dropout"
        )
    return verdict


def _returned(graph: fx.Graph) -> str | None:
    """What a forward returns, in words, where that is not one value."""
    value = next(n for n in graph.nodes if n.op == "output").args[0]
    if isinstance(value, fx.Node):
        return None
    return next((f"a {t.__name__}" for t in (tuple, list, dict) if isinstance(value, t)), repr(value))


def _unread(graph: fx.Graph, block: nn.Module) -> str | None:
    """An operation in place whose result nobody reads, so that only another view of the map can show what it did."""
    output = next(n for n in graph.nodes if n.op == "output")
    read = ancestors([output])
    nodes = (n for n in graph.nodes if n not in read and works_in_place(n, block))
    return next((str(getattr(n.target, "__name__", n.target)) for n in nodes), None)


def adds_itself(model: nn.Module) -> str:
    """Which children's results a network's own forward adds to other maps, "" where none is known."""
    with modes_kept(model):
        model.eval()
        try:
            graph = trace(model, shallow=True)
        except Untraceable:
            return ""
    added = [p for n in graph.nodes if is_join(n) and not is_concatenation(n) for p in operands_of(n) or ()]
    return ", ".join(dict.fromkeys(str(p.target) for p in added if p.op == "call_module"))


def _never(block: nn.Module) -> bool:
    """Containers, layers of torch and dynamic layers: quick to tell, and never a block."""
    if isinstance(block, (DynamicLayer, _BatchNorm)) or type(block).__module__.startswith("torch.nn"):
        return True
    if type(block).forward in (nn.Sequential.forward, nn.Module.forward):
        return True
    return not (any(isinstance(m, (nn.Conv2d, DynamicConv)) for m in block.modules()) or _kernels(block))


def _kernels(block: nn.Module) -> list[nn.Parameter]:
    """Weights [O, I, h, w] of the block's own, for F.conv2d in its forward."""
    return [p for p in block.parameters(recurse=False) if p.dim() == 4]


def _untraceable(block: nn.Module, reason: str) -> Refusal | None:
    convs = sum(isinstance(m, (nn.Conv2d, DynamicConv)) for m in block.modules())
    if convs < 2:
        return None
    advice = "give it a masked_anatomy() or add a handler to dc.convert.HANDLERS"
    return Refusal("untraceable", f"its forward cannot be traced ({reason}); {advice}")


@dataclass(frozen=True)
class _Parts:
    join: fx.Node
    branch: fx.Node
    shortcut: fx.Node


def _read(block: nn.Module, graph: fx.Graph, joins: list[fx.Node]) -> Verdict:
    try:
        probe = _probed(block, graph)
    except OtherWidth as error:
        return Refusal("residual", f"its input could not be followed ({str(error) or 'unknown width'})")
    if probe is None:
        return None
    joins = [j for j in joins if _joins_maps(probe, j)]
    parts = [p for p in (_parts(probe, j) for j in joins) if p is not None]
    if not parts:
        return _refused_join(probe, joins)
    # Of several additions one is masked: that with the most work in its branch, of those that can be.
    parts.sort(key=lambda p: _macs(probe, _branch_nodes(p)), reverse=True)
    first = None
    for part in parts:
        verdict = _program(block, graph, probe, part)
        if isinstance(verdict, Anatomy):
            return verdict
        first = first or verdict
    return first


def _probed(block: nn.Module, graph: fx.Graph) -> Probe | None:
    """The probe for the width that fits, None where no layer tells a width."""
    told = [getattr(m, a) for m in block.modules() for a in ("in_channels", "num_features") if hasattr(m, a)]
    told += [kernel.shape[1] for kernel in _kernels(block)]
    error: OtherWidth | None = None
    # A block may split its input before the first layer.
    for width in dict.fromkeys(factor * w for factor in (1, 2, 4) for w in dict.fromkeys(told)):
        try:
            return Probe(block, graph, width)
        except OtherWidth as failure:
            error = failure if error is None or not str(error) else error
    if error is not None:
        raise error
    return None


def _joins_maps(probe: Probe, join: fx.Node) -> bool:
    """Both operands are maps, or something that could not be followed; vectors and masks are no residual."""
    names = [probe.names[p] for p in operands_of(join) or ()]
    if any(n in probe.refused for n in names):
        return True
    maps = all(probe.layout(n) for n in names)
    shapes = [
        probe.whole[n].shape if n in probe.whole and hasattr(probe.whole[n], "shape") else () for n in names
    ]
    return maps and (is_concatenation(join) or shapes[0] == shapes[1])


def _effort(probe: Probe, nodes: Iterable[fx.Node]) -> tuple[int, int, int]:
    """Layers that multiply among these, those of more than one position, and weights: a branch has more of them."""
    layers = windows = weights = 0
    for node in nodes:
        name = probe.names.get(node, "")
        if name in probe.ops and probe.ops[name].weights:
            op = probe.ops[name]
            layers, weights = layers + 1, weights + op.weights
            windows += op.geometry is not None and op.geometry.kernel != (1, 1)
        elif node.op == "call_module" and name in probe.refused:
            size = sum(p.numel() for p in probe.block.get_submodule(node.target).parameters())
            layers, weights = layers + (size > 0), weights + size
    return layers, windows, weights


def _macs(probe: Probe, nodes: Iterable[fx.Node]) -> int:
    """Multiply-adds of these operations on the trial map."""
    ops = [probe.ops[n.name] for n in nodes if n.name in probe.ops]
    return sum(op.weights * math.prod(probe.grid[op.name]) for op in ops if op.name in probe.grid)


def _branch_nodes(parts: _Parts) -> set[fx.Node]:
    return ancestors([parts.branch]) - ancestors([parts.shortcut])


def _parts(probe: Probe, join: fx.Node) -> _Parts | None:
    operands = operands_of(join)
    assert operands is not None, "only joins are asked for their parts"
    first, second = operands
    mine, others = ancestors([first]), ancestors([second])
    one, two = _effort(probe, mine - others), _effort(probe, others - mine)
    if one == two:
        return None
    branch, shortcut = (first, second) if one > two else (second, first)
    return _Parts(join, branch, shortcut)


def _refused_join(probe: Probe, joins: list[fx.Node]) -> Verdict:
    names = [probe.names[p] for j in joins for p in operands_of(j) or ()]
    reasons = [probe.refused[n] for n in names if n in probe.refused]
    return Refusal("residual", reasons[0]) if reasons else None


def _program(block: nn.Module, graph: fx.Graph, probe: Probe, parts: _Parts) -> Verdict:
    source = next(n for n in graph.nodes if n.op == "placeholder")
    branch_nodes = _branch_nodes(parts)
    if not any(_effort(probe, branch_nodes)):
        return None
    before_nodes = ancestors([parts.shortcut]) - {source}
    after_nodes = ancestors(n for n in graph.nodes if n.op == "output") - ancestors([parts.join])
    cat = is_concatenation(parts.join)
    order = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
    groups = [[n for n in order if n in group] for group in (before_nodes, branch_nodes, after_nodes)]
    if cat:
        groups[2].insert(0, parts.join)
    # What the branch starts from and the shortcut share may be anything that runs.
    shared = {node for node in before_nodes & ancestors([parts.branch]) if node.name in probe.ops}
    for node in [*groups[0], *groups[1], parts.join, *groups[2]]:
        if node.name in probe.refused and node not in shared:
            return Refusal("residual", probe.refused[node.name])
    for node in groups[1]:
        if node.name in probe.mixing:
            return Refusal("residual", probe.mixing[node.name])
    before, branch, after = (tuple(_needed_ops(probe, group)) for group in groups)
    output = next(n for n in graph.nodes if n.op == "output").args[0]
    joined, shortcut = parts.join.name, probe.names[parts.shortcut]
    if cat and any(op.weights for op in before):
        # What is passed on beside the branch must be the input itself.
        return None
    if cat:
        entry = _entry(branch, probe.names[parts.branch])
        if entry is None or probe.whole[entry].shape != probe.whole[parts.branch.name].shape:
            return Refusal(
                "shuffle", "its branch changes shape, so nothing could pass where the mask is closed"
            )
        # The entry is a slice of the input: it is always there, like a shortcut.
        feeding = {op.name for op in branch if op.name in _names_before(branch, entry)}
        before += tuple(op for op in branch if op.name in feeding)
        branch = tuple(op for op in branch if op.name not in feeding)
        joined, shortcut = f"{parts.branch.name}_masked", entry
        after = (_renamed(after[0], parts.branch.name, joined), *after[1:])
    program = Program(
        before, branch, after, shortcut, probe.names[parts.branch], joined,
        probe.names[output] if output is not parts.join or cat else joined, cat, probe.channels(INPUT),
        _stride((*before, *branch), probe.names[parts.branch]),
    )  # fmt: skip
    refusal = _check(program, probe)
    if refusal is None and not computes_the_same(program, block):
        refusal = Refusal(
            "residual", "a map in its forward changes under another name; write y = y * 2, not y *= 2"
        )
    return refusal or anatomy_of(program, block)


def _needed_ops(probe: Probe, nodes: Sequence[fx.Node]) -> list[Op]:
    return [probe.ops[n.name] for n in nodes]


def _entry(branch: Sequence[Op], result: str) -> str | None:
    """The one value that everything which multiplies in the branch is computed from, or None."""
    made = {op.name: op for op in branch}
    first = next((op for op in branch if op.weights), None)
    if first is None or result not in made:
        return None
    entry = first.sources[0]
    depends = {entry}
    for op in branch:
        if any(s in depends for s in op.sources):
            depends.add(op.name)
    for op in branch:
        if (
            op.name in depends
            and op.name != entry
            and any(
                s not in depends and (s == INPUT or (s in made and made[s].role in ("window", "local")))
                for s in op.sources
            )
        ):
            return None
    return entry


def _names_before(branch: Sequence[Op], entry: str) -> set[str]:
    made = {op.name: op for op in branch}
    found, stack = set(), [entry]
    while stack:
        name = stack.pop()
        if name in made and name not in found:
            found.add(name)
            stack += made[name].sources
    return found


def _renamed(op: Op, old: str, new: str) -> Op:
    def swap(tree):
        if isinstance(tree, Ref):
            return Ref(new) if tree.name == old else tree
        return type(tree)(swap(v) for v in tree) if isinstance(tree, (tuple, list)) else tree

    return Op(**{**vars(op), "args": swap(op.args)})


def _stride(branch: Sequence[Op], result: str) -> int:
    strides: dict[str, int] = {}
    for op in branch:
        before = max((strides.get(s, 1) for s in op.sources), default=1)
        strides[op.name] = before * (1 if op.geometry is None else op.geometry.stride[0])
    return strides[result]


def _is_projection(op: Op) -> bool:
    return op.role != "mixing" and op.geometry.kernel == (1, 1)


def _check(program: Program, probe: Probe) -> Refusal | None:
    """What the mask unit and the executors could not do with a program that was read."""
    inner = {o.name for o in program.branch}
    entries = {s for op in program.branch for s in op.sources} - inner
    common = set().union(*(_names_before(program.before, name) for name in entries))
    convs = [op for op in program.before if op.weights and op.name not in common]
    if len(convs) > 1 or any(op.geometry is not None and not _is_projection(op) for op in convs):
        return Refusal("residual", "its shortcut has a convolution of more than one position, or several")
    outside = {op.path for op in (*program.before, *program.after) if op.weights}
    twice = outside & {op.path for op in program.convolutions}
    if twice:
        # Counts are by layer.
        places = "inside and outside of the branch; give each place its own layer"
        return Refusal("residual", f"its {min(twice)} runs {places}")
    if any(op.weights for op in program.after):
        return Refusal("residual", "it convolves after the addition; make a module of the residual part")
    if probe.layout(program.result) != NCHW:
        return Refusal("residual", "it adds maps that are not [N, C, H, W]")
    grid = tuple((n - 1) // program.stride + 1 for n in GRID)
    if probe.grid[program.result] != grid:
        return Refusal(
            "residual", f"it turns a map of {GRID} into {probe.grid[program.result]}, expected {grid}"
        )
    where = grids(program, GRID)
    for name in entries:
        if probe.layout(name) not in ((), NCHW):
            return Refusal("residual", "its branch starts from a map that is not [N, C, H, W]")
        if probe.layout(name) == NCHW and name not in where:
            return Refusal("residual", "its branch starts behind something that mixes positions")
    needs = branch_needs(program, torch.ones(1, 1, *grid), GRID)
    for op in program.branch:
        if op.role in ("mean", "norm") and op.sources[0] in inner and op.sources[0] not in needs:
            return Refusal(
                "residual", "it averages a map over positions that nothing else says which to compute"
            )
    return None


__all__ = ["read_block"]
