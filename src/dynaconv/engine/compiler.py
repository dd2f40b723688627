"""`dynaconv.compile`: export, passes, plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.engine import (  # noqa: F401  handlers register themselves
    arena,
    build_constants,
    build_masks,
    build_ops,
    build_parts,
    build_resampling,
    build_views,
    dynamic,
    fusion,
)
from dynaconv.engine.build import Builder
from dynaconv.engine.compiled import CompiledModel, choose_backend
from dynaconv.engine.expansions import fuse_expansions
from dynaconv.engine.export import Exported, export
from dynaconv.engine.fold import fold
from dynaconv.engine.fuse import (
    fuse_activations,
    fuse_gates,
    fuse_residuals,
    fuse_silu,
    fuse_weighted_sums,
)
from dynaconv.engine.inverted import fuse_inverted
from dynaconv.engine.ir import Graph
from dynaconv.engine.lower import lower
from dynaconv.engine.masks import place_shortcuts, recognise_masks
from dynaconv.engine.measure import measure_plan
from dynaconv.engine.merge import merge_parallel
from dynaconv.engine.narrow import drop_channels, skip_channels
from dynaconv.engine.plan import Plan
from dynaconv.engine.pool import drop_unread, pool_weights
from dynaconv.engine.precision import to_bfloat16
from dynaconv.engine.resampling import place_resampling
from dynaconv.engine.routers import fuse_routers, share_means
from dynaconv.engine.scales import fuse_hard_sigmoids, fuse_response_norms, fuse_scales, push_scales

PASSES = (
    place_resampling,
    fuse_response_norms,
    fuse_scales,
    fuse_hard_sigmoids,
    push_scales,
    drop_channels,
    fold,
    merge_parallel,
    fuse_silu,
    fuse_activations,
    fuse_gates,
    fuse_weighted_sums,
    skip_channels,
    recognise_masks,
    fuse_residuals,
    place_shortcuts,
    fuse_inverted,
)


def compile(
    model: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
    threads: int | None = None,
    measure: bool = True,
) -> CompiledModel:
    """Turn a network in evaluation mode into a plan of native steps whose time follows the executed MACs.

    What has no kernel runs through ATen and is listed, with the reason, in `fast.plan`. The network itself is not
    changed, and later changes of it do not reach the compiled model.

    Args:
        model: on the CPU, in float32; static, or made dynamic by `dynamize_`.
        example_inputs: (x,) with images [N, C, H, W]; N stays free, C, H and W are fixed.
        dtype: of feature maps and weights, torch.float32 (also None) or torch.bfloat16; sums, masks, routing weights,
            images and results stay float32. bfloat16 needs a processor with AVX512_BF16.
        backend: "auto", "cpu" (compiled kernels), "triton" or "eager"; only "auto" falls back.
        threads: for the native steps; None follows `torch.get_num_threads()` at every call.
        measure: time masked convolutions on this machine, to know above which density they run densely.
    Returns:
        CompiledModel; `fast(x)`, `fast.plan`, `fast.verify((x,))`, `fast.save(path)`, `fast.set_budget(target)`.
    Raises:
        ValueError: training mode, a dtype without kernels here, a network that torch.export cannot follow.
        TypeError: no module, or example inputs that are no tuple of tensors. RuntimeError: an explicit backend that
        cannot run.

    >>> import torch, dynaconv as dc
    >>> x = torch.randn(2, 3, 32, 32)
    >>> fast = dc.compile(dc.create_model("resnet8_cifar").eval(), (x,))
    >>> fast(x).shape
    torch.Size([2, 10])
    """
    _check(model, example_inputs, dtype)
    chosen, _ = choose_backend(backend, dtype or torch.float32)
    example = tuple(example_inputs)
    plan, exported = make_plan(model, example, dtype)
    if measure and chosen == "cpu":
        measure_plan(plan, example, threads)
    return CompiledModel(plan, exported.out_spec, backend=backend, threads=threads, source=model)


def _check(model: nn.Module, example_inputs: Any, dtype: torch.dtype | None) -> None:
    if not isinstance(model, nn.Module):
        raise _checks.engine_model(model)
    _checks.engine_example(example_inputs)
    if dtype not in (None, torch.float32, torch.bfloat16):
        raise _checks.engine_dtype(dtype, "there are kernels for torch.float32 and torch.bfloat16")
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise _checks.engine_training(training)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type != "cpu":
            raise _checks.engine_device(tensor.device)


def make_plan(
    model: nn.Module, example: tuple[Tensor, ...], dtype: torch.dtype | None = None
) -> tuple[Plan, Exported]:
    """The plan of a network in evaluation mode, and the export that it comes from."""
    exported = export(model, example)
    graph = Builder(exported).build()
    name_gates(graph, model)
    for change in PASSES:
        change(graph)
    if dtype != torch.bfloat16:
        fuse_expansions(graph)
        share_means(graph)
        fuse_routers(graph)
    plan = lower(graph, exported.fixed_batch, len(exported.inputs))
    plan.fixed_gates = [name for name in gates(model) if name not in {g.name for g in plan.gates if g.dial}]
    if dtype == torch.bfloat16:
        to_bfloat16(plan)
    arena.place(plan)
    drop_unread(plan)
    pool_weights(plan)
    return plan, exported


def name_gates(graph: Graph, model: nn.Module) -> None:
    """Tell the masks which gate of the model decides them, and its table of budgets."""
    known = {f"{name}.gate".removeprefix("."): (name, gate) for name, gate in gates(model).items()}
    for node in graph.nodes:
        if node.op in ("threshold", "open_channels") and node.layer in known:
            node.attrs["gate"], gate = known[node.layer]
            node.attrs["budgets"] = gate.budget_table.tolist()
            node.attrs |= {"scope": gate.scope, "dial": gate.dial}
