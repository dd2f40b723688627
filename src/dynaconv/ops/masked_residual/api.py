"""Masked residual block: checks, choice of executor, gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _backends, _registry
from dynaconv.ops.masked_residual import cpu, reference
from dynaconv.ops.masked_residual.branch import PackedBranch
from dynaconv.ops.masked_residual.op import OP, arguments


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

    Compilers and exporters see one node, `dynaconv::masked_residual`.

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
        ValueError: a mask of another size or with NaN in it, an unknown backend.
        RuntimeError: an explicit backend that cannot run here.
    Source: arXiv 1912.03203, equation 1 and section 3.3.
    """
    _checks.finite_mask(mask)
    if branch.native is not None and backend in ("auto", "cpu") and _plain(x):
        y = _compiled(x, mask, shortcut, branch.native, break_even)
        if y is not None:
            return y
        return reference.masked_residual(x, mask, shortcut, branch.convs, branch.activation)
    chosen = _backends.choose("masked_residual", backend, {"cpu": cpu.can_run}, x)
    _checks.mask_for(mask, (shortcut.shape[0], shortcut.shape[2], shortcut.shape[3]))
    if chosen == "eager":
        return reference.masked_residual(x, mask, shortcut, branch.convs, branch.activation)
    if chosen == "traced":
        return OP(*arguments(x, mask, shortcut, branch, weights, break_even, None))
    given = arguments(x, mask, shortcut, branch, weights, break_even, branch.native)
    gradient = torch.is_grad_enabled() and _registry.wants_gradient(x, mask, shortcut, *given[3], *given[4])
    if gradient or branch.native is not None:
        return OP(*given)
    return cpu.masked_residual(x, mask, shortcut, branch, break_even)


def _plain(x: Tensor) -> bool:
    """A call in which only the kernels have a part: no gradient, compiler or autocast."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype is torch.float32 and x.is_cpu


def _compiled(
    x: Tensor, mask: Tensor, shortcut: Tensor, packed: Tensor, break_even: float | None
) -> Tensor | None:
    """By the compiled kernels, which check shapes themselves; None where more than `break_even` would be computed."""
    try:
        y = _registry.below_autograd(
            _registry.RUN_BRANCH, x, mask, shortcut, packed, -1.0 if break_even is None else break_even
        )
    except RuntimeError:
        _checks.mask_for(mask, (shortcut.shape[0], shortcut.shape[2], shortcut.shape[3]))
        raise
    return y if y.shape[1] else None
