"""Sampling and dilating binary masks, with the gradients that training needs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.utils import _pair

from dynaconv import _checks
from dynaconv.ops.mask_ops import reference

DILATION_GRADIENTS = ("none", "marginal", "max")


class _StraightThrough(torch.autograd.Function):
    """Forward 1[z' >= 0]; backward p (1 - p) / temperature with p = sigmoid(z' / temperature)."""

    @staticmethod
    def forward(ctx, noisy: Tensor, temperature: Tensor) -> Tensor:
        ctx.save_for_backward(noisy, temperature)
        # A closed position would hide NaN from the loss, and from whoever looks for it.
        return torch.where(noisy.isnan(), noisy, (noisy >= 0).to(noisy.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        noisy, temperature = ctx.saved_tensors
        p = torch.sigmoid(noisy / temperature)
        return grad * p * (1 - p) / temperature, None


def gumbel_mask(
    logits: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    noise: Tensor | float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sample a binary mask with straight-through gradient (binary Gumbel-softmax).

    P(open) = sigmoid(logit), whatever the temperature, which only shapes the gradient.

    Args:
        logits: [N, 1, h, w]; a logit (plus noise) of exactly 0 is open.
        temperature: > 0, scalar.
        noise: None draws Logistic(0, 1) noise in float32; a tensor is used as it is; 0 switches noise off.
        generator: random generator for the noise.
    Returns:
        [N, 1, h, w] of 0 and 1, in the dtype of the logits (float32 for half-precision logits); NaN where they are.
    Source: arXiv 1912.03203, section 3.1, equations 3-6.

    >>> gumbel_mask(torch.tensor([[[[-1.0, 0.0, 2.0]]]]), noise=0)
    tensor([[[[0., 1., 1.]]]])
    """
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if noise is None:
        noise = reference.sample_logistic(logits, generator)
    temperature = torch.as_tensor(temperature, dtype=logits.dtype, device=logits.device)
    return _StraightThrough.apply(logits + noise, temperature)


class _MarginalDilation(torch.autograd.Function):
    """Dilation whose gradient is the exact change of sum(g * D) when one mask position flips."""

    @staticmethod
    def forward(ctx, mask: Tensor, size, kernel, stride, padding, dilation) -> Tensor:
        if _is_same(mask, size, kernel, stride, padding, dilation):
            count = _window_sum(_stuffed(mask, size, stride), kernel, (1, 1), padding)
        else:
            count = reference.reader_count(mask, size, kernel, stride, padding, dilation)
        ctx.geometry = (kernel, stride, padding, dilation)
        ctx.save_for_backward(mask, count)
        return (count > 0.5).to(mask.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        mask, count = ctx.saved_tensors
        grad = grad.to(mask.dtype)
        # One reader that is open and closes, or none and it opens: only then the position changes.
        changes = torch.cat([grad * ((count - 1).abs() < 0.5), grad * (count < 0.5)], 1)
        closing, opening = _read_back(changes, ctx.geometry, mask.shape[2:]).split(1, 1)
        return torch.where(mask > 0.5, closing, opening), None, None, None, None, None


def _read_back(values: Tensor, geometry: tuple, size: tuple[int, int]) -> Tensor:
    """For every output position the sum of what the convolution reads, channel by channel."""
    kernel, stride, padding, dilation = geometry
    if dilation == (1, 1) and all(2 * p <= k for k, p in zip(kernel, padding, strict=True)):
        summed = _window_sum(values, kernel, stride, padding)
    else:
        ones = torch.ones(values.shape[1], 1, *kernel, dtype=values.dtype, device=values.device)
        summed = F.conv2d(values, ones, None, stride, padding, dilation, values.shape[1])
    return summed[:, :, : size[0], : size[1]]


def _window_sum(values: Tensor, kernel, stride, padding) -> Tensor:
    """A convolution with ones, by the pooling kernels, which are faster on maps of one channel."""
    return F.avg_pool2d(values, kernel, stride, padding, divisor_override=1)


def dilate(
    mask: Tensor,
    size: tuple[int, int],
    *,
    kernel_size=3,
    stride=1,
    padding=1,
    dilation=1,
    gradient: str = "none",
) -> Tensor:
    """Mark every input position that some active output of a convolution reads (its receptive field).

    Args:
        mask: [N, 1, h, w] of 0 and 1, on the convolution's output grid.
        size: (H, W), the convolution's input grid.
        kernel_size, stride, padding, dilation: the convolution's geometry, int or pair.
        gradient: "none" (as published), "marginal" (exact change when one position flips) or "max" (of max-pooling).
    Returns:
        [N, 1, H, W] of 0 and 1.
    Raises:
        ValueError: unknown gradient.
    Source: arXiv 1912.03203, section 3.3; the marginal gradient is ours.

    >>> dilate(torch.tensor([[[[0.0, 0.0, 1.0]]]]), (1, 3))
    tensor([[[[0., 1., 1.]]]])
    """
    _checks.one_of("dilation gradient", gradient, DILATION_GRADIENTS)
    kernel, stride, padding, dilation = (tuple(_pair(v)) for v in (kernel_size, stride, padding, dilation))
    # A free size of a traced network stays what it is: as a whole number it would be a constant.
    size = tuple(side if isinstance(side, torch.SymInt) else int(side) for side in size)
    wants_grad = torch.is_grad_enabled() and mask.requires_grad
    if wants_grad and gradient == "marginal":
        return _MarginalDilation.apply(mask, size, kernel, stride, padding, dilation)
    if not (wants_grad and gradient == "max"):
        mask = mask.detach()
    return _pooled(mask, size, kernel, stride, padding, dilation)


def _pooled(mask: Tensor, size, kernel, stride, padding, dilation) -> Tensor:
    if not _is_same(mask, size, kernel, stride, padding, dilation):
        return reference.dilate(mask, size, kernel, stride, padding, dilation)
    mask = _stuffed(mask, size, stride)
    return mask if kernel == (1, 1) else F.max_pool2d(mask, kernel, 1, padding)


def _is_same(mask: Tensor, size, kernel, stride, padding, dilation) -> bool:
    """A convolution that keeps the grid but for its stride; pooling takes at most half a kernel of padding."""
    same = all(d == 1 and 2 * p == k - 1 for k, p, d in zip(kernel, padding, dilation, strict=True))
    return same and all((size[i] - 1) // stride[i] + 1 == mask.shape[2 + i] for i in (0, 1))


def _stuffed(mask: Tensor, size, stride) -> Tensor:
    """The mask on the input grid, zeros between."""
    if stride == (1, 1):
        return mask
    stuffed = mask.new_zeros(mask.shape[0], 1, *size)
    stuffed[:, :, :: stride[0], :: stride[1]] = mask
    return stuffed


def upsample_mask(mask: Tensor, granularity_px: int, size: tuple[int, int]) -> Tensor:
    """Repeat every decision over granularity_px x granularity_px positions and crop to `size` = (h, w)."""
    if granularity_px == 1:
        return mask
    if any(isinstance(side, torch.SymInt) for side in size):
        # Cropping would tie a free size to those that the granularity divides.
        rows, columns = (torch.arange(side, device=mask.device) // granularity_px for side in size)
        return mask.index_select(2, rows).index_select(3, columns)
    mask = mask.repeat_interleave(granularity_px, 2).repeat_interleave(granularity_px, 3)
    return mask[:, :, : size[0], : size[1]]
