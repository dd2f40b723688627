"""`dynaconv.compile`: export, passes, plan."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dynaconv.convert import gates
from dynaconv.engine import arena, build_ops, build_views  # noqa: F401  the handlers register themselves
from dynaconv.engine.build import Builder
from dynaconv.engine.export import Exported, export
from dynaconv.engine.fold import fold
from dynaconv.engine.fuse import fuse_activations, fuse_gates, fuse_residuals, fuse_silu
from dynaconv.engine.ir import Graph
from dynaconv.engine.lower import lower
from dynaconv.engine.masks import place_shortcuts, recognise_masks
from dynaconv.engine.plan import Plan

PASSES = (fold, fuse_silu, fuse_activations, fuse_gates, recognise_masks, fuse_residuals, place_shortcuts)


def make_plan(model: nn.Module, example: tuple[Tensor, ...]) -> tuple[Plan, Exported]:
    """The plan of a network in evaluation mode, and the export that it comes from."""
    exported = export(model, example)
    graph = Builder(exported).build()
    name_gates(graph, model)
    for change in PASSES:
        change(graph)
    plan = lower(graph, exported.fixed_batch)
    arena.place(plan)
    return plan, exported


def name_gates(graph: Graph, model: nn.Module) -> None:
    """Tell the masks which gate of the model decides them, and its table of budgets."""
    known: dict[str, tuple[str, Any]] = {}
    for name, gate in gates(model).items():
        known[f"{name}.gate".removeprefix(".")] = (name, gate.budget_table.tolist())
    for node in graph.nodes:
        if node.op == "threshold" and node.layer in known:
            node.attrs["gate"], node.attrs["budgets"] = known[node.layer]
