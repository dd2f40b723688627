"""Mask logits of a squeeze unit, `torch.ops.dynaconv.mask_logits`: a 3x3 convolution to one channel and a linear
function of the mean, both of the same feature map (arXiv 1912.03203, section 3.2).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _registry
from dynaconv.ops._recompute import recompute_gradients


def mask_logits(x: Tensor, weight: Tensor, linear: Tensor, bias: Tensor, stride: int = 1) -> Tensor:
    """z = conv3x3(x, weight) + linear @ mean(x) + bias: one score a position.

    Compilers and exporters see one node, `dynaconv::mask_logits`.

    Args:
        x: [N, C, H, W].
        weight: [1, C, 3, 3], applied with padding 1; fastest when its channels are innermost (torch.channels_last).
        linear: [1, C], of the mean over positions. bias: [1].
        stride: of the convolution.
    Returns:
        [N, 1, h, w] with h = (H - 1) // stride + 1.
    Raises:
        ValueError: x has other channels than the weight.
    Source: arXiv 1912.03203, section 3.2.

    >>> import torch
    >>> mask_logits(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 3, 3), torch.ones(1, 1), torch.zeros(1))
    tensor([[[[3., 3.]]]])
    """
    _checks.images(x, weight.shape[1], "mask_logits")
    return OP(x, weight, linear, bias, stride)


def _reference(x: Tensor, weight: Tensor, linear: Tensor, bias: Tensor, stride: int) -> Tensor:
    average = F.linear(x.mean((2, 3)), linear.reshape(1, -1), bias)
    return F.conv2d(x, weight, None, stride, 1) + average[:, :, None, None]


def _eager(x: Tensor, weight: Tensor, linear: Tensor, bias: Tensor, stride: int) -> Tensor:
    return _reference(x, weight, linear, bias, stride).contiguous()


def _fake(x: Tensor, weight: Tensor, linear: Tensor, bias: Tensor, stride: int) -> Tensor:
    return x.new_empty((x.shape[0], 1, (x.shape[2] - 1) // stride + 1, (x.shape[3] - 1) // stride + 1))


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad: Tensor) -> tuple:
    def forward(x, weight, linear, bias) -> Tensor:
        return _reference(x, weight, linear, bias, ctx.stride)

    return *recompute_gradients(forward, ctx.saved_tensors, grad), None


def _flops(x_shape, weight_shape, *args, out_shape, **kwargs) -> int:
    return 2 * (weight_shape.numel() * out_shape.numel() + x_shape[0] * x_shape[1])


OP = _registry.register(
    "mask_logits",
    "Tensor x, Tensor weight, Tensor linear, Tensor bias, int stride",
    eager=_eager,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=_flops,
    decomposition=_eager,
)
