"""Masked convolution: equal to mask * convolution, values and gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.nn import MaskedConv2d
from dynaconv.ops import masked_conv2d
from dynaconv.testing import random_mask

TOLERANCE = 1e-5


def close(got: torch.Tensor, want: torch.Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    assert float((got - want).abs().max()) <= tolerance * max(1.0, float(want.abs().max()))


@given(
    size=st.tuples(st.integers(1, 11), st.integers(1, 11)),
    kernel=st.sampled_from([1, 2, 3, 5]),
    stride=st.integers(1, 3),
    dilation=st.integers(1, 2),
    groups=st.sampled_from([1, 2, 4]),
    multiplier=st.integers(1, 2),
    density=st.sampled_from([0.0, 0.3, 0.8, 1.0]),
    batch=st.sampled_from([1, 3]),
    bias=st.booleans(),
)
def test_equals_mask_times_convolution(
    size, kernel, stride, dilation, groups, multiplier, density, batch, bias
) -> None:
    padding = dilation * (kernel // 2)
    generator = torch.Generator().manual_seed(0)
    out = [(v + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for v in size]
    if min(out) < 1:
        return
    x = torch.randn(batch, 4, *size, generator=generator)
    w = torch.randn(4 * multiplier, 4 // groups, kernel, kernel, generator=generator)
    b = torch.randn(4 * multiplier, generator=generator) if bias else None
    mask = random_mask(batch, tuple(out), density, seed=5)
    want = mask * F.conv2d(x, w, b, stride, padding, dilation, groups)
    for backend in ("cpu", "eager"):
        close(masked_conv2d(x, mask, w, b, stride, padding, dilation, groups, backend=backend), want)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32])
def test_layouts_and_mask_types(mask_dtype: torch.dtype) -> None:
    x, w = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3)
    mask = random_mask(2, (6, 5), 0.5).to(mask_dtype)
    want = mask * F.conv2d(x, w, padding=1)
    strided = torch.randn(2, 3, 12, 5)[:, :, ::2]
    strided.copy_(x)
    for variant in (x, x.contiguous(memory_format=torch.channels_last), strided):
        close(masked_conv2d(variant, mask, w, padding=1, backend="cpu"), want)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck(backend: str, stride: int) -> None:
    x = torch.randn(2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(3, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    b = torch.randn(3, dtype=torch.float64, requires_grad=True)
    mask = random_mask(2, (-(-4 // stride), -(-5 // stride)), 0.5).double()
    assert torch.autograd.gradcheck(
        lambda *a: masked_conv2d(a[0], mask, a[1], a[2], stride, 1, backend=backend), (x, w, b)
    )


def test_gradient_reaches_the_mask() -> None:
    x, w = torch.randn(1, 2, 4, 4), torch.randn(3, 2, 3, 3)
    grads = []
    for backend in ("cpu", "eager"):
        mask = random_mask(1, (4, 4), 0.5).requires_grad_(True)
        masked_conv2d(x, mask, w, padding=1, backend=backend).sum().backward()
        grads.append(mask.grad)
    close(grads[0], grads[1])


def test_nan_outside_the_receptive_field_is_never_read() -> None:
    w = torch.randn(3, 2, 3, 3)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., 2, 2] = 1
    x = torch.full((1, 2, 8, 8), float("nan"))
    x[..., 1:4, 1:4] = 1.0
    assert bool(masked_conv2d(x, mask, w, padding=1, backend="cpu").isfinite().all())


def test_permuting_the_batch_permutes_the_output() -> None:
    x, w, mask = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 3, 3), random_mask(4, (5, 5), 0.4)
    order = torch.tensor([2, 0, 3, 1])
    y = masked_conv2d(x, mask, w, padding=1, backend="cpu")
    close(masked_conv2d(x[order], mask[order], w, padding=1, backend="cpu"), y[order])


def test_bad_input() -> None:
    x, w = torch.randn(8, 3, 28, 28), torch.randn(4, 3, 3, 3)
    with pytest.raises(
        ValueError,
        match=r"mask must be \[N, 1, H, W\] = \[8, 1, 28, 28\].*got \[8, 1, 14, 14\].*SpatialMask.resize",
    ):
        masked_conv2d(x, torch.ones(8, 1, 14, 14), w, padding=1)
    with pytest.raises(ValueError, match=r"expects x \[N, 3, H, W\], got \[8, 5, 28, 28\]"):
        masked_conv2d(torch.randn(8, 5, 28, 28), torch.ones(8, 1, 28, 28), w, padding=1)
    with pytest.raises(ValueError, match="unknown backend 'cpuu'; did you mean 'cpu'"):
        masked_conv2d(x, torch.ones(8, 1, 28, 28), w, padding=1, backend="cpuu")
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match="autocast is on"):
        masked_conv2d(x, torch.ones(8, 1, 28, 28), w, padding=1, backend="cpu")


def test_module_is_a_drop_in() -> None:
    conv = torch.nn.Conv2d(4, 6, 3, 2, 1, groups=2)
    masked = MaskedConv2d.from_conv(conv)
    x = torch.randn(2, 4, 7, 9)
    mask = random_mask(2, (4, 5), 0.5)
    assert list(masked.state_dict()) == list(conv.state_dict())
    close(masked(x).detach(), conv(x).detach())
    for mode in (True, False):
        close(masked.train(mode)(x, mask).detach(), (mask * conv(x)).detach())
    with pytest.raises(ValueError, match="padding_mode='zeros'"):
        MaskedConv2d(3, 4, 3, padding=1, padding_mode="reflect")


def test_traced_graphs_take_the_dense_form() -> None:
    compiled = torch.compile(masked_conv2d, fullgraph=True, backend="eager")
    w = torch.randn(4, 3, 3, 3)
    for size in (6, 9):
        x, mask = torch.randn(2, 3, size, size), random_mask(2, (size, size), 0.5)
        close(compiled(x, mask, w, padding=1), mask * F.conv2d(x, w, padding=1))
