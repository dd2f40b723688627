"""`torch.ops.dynaconv.masked_mean`: what compilers see of a mean over open positions."""

from __future__ import annotations

from torch import Tensor

from dynaconv.ops import _registry
from dynaconv.ops.masked_mean import reference


def _fake(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 1, 1)


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    x, mask = inputs
    ctx.like = x.shape
    ctx.save_for_backward(mask)


def _backward(ctx, grad: Tensor) -> tuple:
    (mask,) = ctx.saved_tensors
    mask = mask.to(grad.dtype)
    return (grad / mask.sum((2, 3), keepdim=True).clamp(min=1)).expand(ctx.like) * mask, None


OP = _registry.register(
    "masked_mean",
    "Tensor x, Tensor mask",
    eager=reference.masked_mean,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=lambda *shapes, **kwargs: 0,
    decomposition=reference.masked_mean,
)
