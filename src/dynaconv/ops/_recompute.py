"""Gradients of a fast forward, taken by recomputing its reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recompute_gradients(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of function(*tensors) for every floating tensor, None for the others."""
    leaves = [None if t is None else t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    with torch.enable_grad():
        value = function(*leaves)
    found = iter(torch.autograd.grad(value, wanted, grad, allow_unused=True))
    return [next(found) if t is not None and t.requires_grad else None for t in leaves]
