"""Running a block's program densely: every position of the branch, times the mask once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.block_program import INPUT, Op, Program, branch_needs, evaluate
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_kernels import coefficients
from dynaconv.ops.masked_mean import masked_mean


def run_dense(
    program: Program, block: nn.Module, x: Tensor, mask: Tensor, shared: dict[str, Tensor]
) -> Tensor:
    """The definition: the branch everywhere, times the mask, joined with the shortcut.

    Squeeze-excite and kernels that depend on an inner feature map see the positions that skipping would compute.

    Args:
        x: [N, C, H, W]. mask: [N, 1, h, w]. shared: coefficients of a router that serves the block, by layer.
    """
    values = run_before(program, block, x, shared)
    needs: dict[str, Tensor] = {}
    if program.pools or any(_is_dynamic(op, block) for op in program.branch):
        needs = branch_needs(program, mask.detach(), x.shape[2:])
    for op in program.branch:
        values[op.name] = _step(op, block, values, needs, shared)
    branch, shortcut = values[program.result], values[program.shortcut]
    _checks.mask_for(mask, (branch.shape[0], branch.shape[2], branch.shape[3]))
    gate = mask.to(branch.dtype)
    if program.replaces:
        shortcut = (1 - gate) * shortcut
    return run_after(program, block, values, shortcut + gate * branch)


def run_before(program: Program, block: nn.Module, x: Tensor, shared: dict[str, Tensor]) -> dict[str, Any]:
    """Values of the block's input and of everything that is always computed."""
    values: dict[str, Any] = {INPUT: x}
    for op in program.before:
        values[op.name] = _step(op, block, values, {}, shared)
    return values


def run_after(program: Program, block: nn.Module, values: dict[str, Any], joined: Tensor) -> Tensor:
    """From the joined map to the block's output."""
    values[program.joined] = joined
    for op in program.after:
        values[op.name] = evaluate(op, block, values)
    return values[program.output]


def _is_dynamic(op: Op, block: nn.Module) -> bool:
    return op.call == "module" and isinstance(block.get_submodule(op.target), DynamicConv)


def _step(
    op: Op, block: nn.Module, values: dict[str, Any], needs: dict[str, Tensor], shared: dict[str, Tensor]
) -> Any:
    source = op.sources[0] if op.sources else ""
    need = needs.get(source)
    if op.role in ("mean", "norm") and need is not None:
        return _pooled(op, block, values, need, source)
    if _is_dynamic(op, block):
        conv, hidden = block.get_submodule(op.target), values[source]
        return conv(hidden, routing=coefficients(conv, op.target, shared, hidden, need))
    return evaluate(op, block, values)


def _pooled(op: Op, block: nn.Module, values: dict[str, Any], need: Tensor, source: str) -> Tensor:
    hidden = values[source]
    nchw = hidden if op.layout == (2, 3) else hidden.permute(0, 3, 1, 2)
    if op.role == "norm" and torch.is_grad_enabled():
        mask = need if op.layout == (2, 3) else need.permute(0, 2, 3, 1)
        # A root has no gradient at zero: an image without open positions must not meet it.
        some = mask.sum((1, 2, 3), keepdim=True) > 0
        safe = torch.where(some, hidden * mask.to(hidden.dtype), torch.ones_like(hidden))
        pooled = evaluate(op, block, {**values, source: safe})
        return torch.where(some.reshape(-1, *(1 for _ in pooled.shape[1:])), pooled, torch.zeros_like(pooled))
    if op.role == "norm":
        # By a mean, whose rows alone compilers know to be needed.
        whole = nchw.float()
        squares = masked_mean(whole * whole, need) * need.sum((1, 2, 3), keepdim=True)
        return squares.sqrt().to(hidden.dtype).reshape(-1, *op.shape[1:])
    return masked_mean(nchw, need).reshape(-1, *op.shape[1:])
