"""`torch.ops.dynaconv.masked_mean`: what compilers see of a mean over open positions."""

from __future__ import annotations

from torch import Tensor

from dynaconv.ops import _registry
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.masked_mean import reference


def _fake(x: Tensor, mask: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1], 1, 1)


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad: Tensor) -> tuple:
    return tuple(recompute_gradients(reference.masked_mean, ctx.saved_tensors, grad))


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
