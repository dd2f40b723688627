"""Masked residual block: checks, choice of executor, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _backends
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.masked_residual import cpu, reference
from dynaconv.ops.masked_residual.branch import PackedBranch


class _Differentiable(torch.autograd.Function):
    """Sparse forward; the backward recomputes the reference, which has the same values."""

    @staticmethod
    def forward(
        ctx,
        branch: PackedBranch,
        break_even: float | None,
        x: Tensor,
        mask: Tensor,
        shortcut: Tensor,
        *weights,
    ):
        ctx.branch = branch
        ctx.save_for_backward(x, mask, shortcut, *weights)
        return cpu.masked_residual(x, mask, shortcut, branch, break_even)

    @staticmethod
    def backward(ctx, grad: Tensor):
        branch = ctx.branch

        def forward(x, mask, shortcut, *weights):
            rest = iter(weights)
            convs = [
                replace(c, weight=next(rest), bias=None if c.bias is None else next(rest))
                for c in branch.convs
            ]
            return reference.masked_residual(x, mask, shortcut, convs, branch.activation)

        return None, None, *recompute_gradients(forward, ctx.saved_tensors, grad)


def masked_residual(
    x: Tensor,
    mask: Tensor,
    shortcut: Tensor,
    branch: PackedBranch,
    *,
    weights: Sequence[Tensor] | None = None,
    backend: str = "auto",
    break_even: float | None = None,
) -> Tensor:
    """y = act(shortcut + mask * branch(x)), computing the branch only where the mask asks for it.

    Args:
        x: [N, C, H, W], the block's input.
        mask: [N, 1, h, w] of 0 and 1 on the block's output grid.
        shortcut: [N, C_out, h, w], what passes where the mask is closed.
        branch: the convolutions (batch norm folded) and the block's activation.
        weights: what to differentiate with respect to: each convolution's weight and, where it has one, bias, equal in
            value to those of `branch`; None takes the branch's own.
        backend: "cpu" (index lists), "eager" (dense, times the mask) or "auto".
        break_even: share of the branch's MACs above which the dense computation is used; None takes the measured one.
    Returns:
        [N, C_out, h, w].
    Raises:
        ValueError: a mask of another size, an unknown backend.
        RuntimeError: an explicit backend that cannot run here.
    Source: arXiv 1912.03203, equation 1 and section 3.3.
    """
    chosen = _backends.choose("masked_residual", backend, {"cpu": cpu.can_run}, x)
    _checks.mask_for(mask, (shortcut.shape[0], shortcut.shape[2], shortcut.shape[3]))
    if chosen == "eager":
        return reference.masked_residual(x, mask, shortcut, branch.convs, branch.activation)
    if torch.is_grad_enabled():
        if weights is None:
            weights = [t for conv in branch.convs for t in (conv.weight, conv.bias) if t is not None]
        if any(t.requires_grad for t in (x, mask, shortcut, *weights)):
            return _Differentiable.apply(branch, break_even, x, mask, shortcut, *weights)
    return cpu.masked_residual(x, mask, shortcut, branch, break_even)
