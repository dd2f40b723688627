"""Sampling and dilation against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from dynaconv.ops import dilate, gumbel_mask
from dynaconv.ops.mask_ops import conv3x3_to_one, nine_taps, reference, upsample_mask
from dynaconv.testing import random_mask

SIZES = [(1, 1), (2, 3), (7, 9), (8, 8), (13, 6)]


def receptive_field(mask: torch.Tensor, size: tuple[int, int], k, s, p, d) -> torch.Tensor:
    """Input positions with a nonzero gradient of the active outputs."""
    x = torch.zeros(mask.shape[0], 1, *size, requires_grad=True)
    y = F.conv2d(x, torch.ones(1, 1, k, k), None, s, p, d)
    (y * mask).sum().backward()
    return (x.grad > 0.5).float()


@pytest.mark.parametrize("size", [(7, 9), (8, 8), (13, 6)])
@pytest.mark.parametrize(
    ("k", "s", "p", "d"),
    [
        (3, 1, 1, 1),
        (3, 2, 1, 1),
        (3, 3, 1, 1),
        (1, 1, 0, 1),
        (1, 2, 0, 1),
        (5, 1, 2, 1),
        (5, 2, 2, 1),
        (7, 1, 3, 1),
        (3, 1, 2, 2),
        (3, 1, 0, 1),
        (3, 2, 0, 1),
        (2, 2, 0, 1),
    ],
)
@pytest.mark.parametrize("density", [0.0, 0.2, 1.0])
def test_dilation_is_the_receptive_field(size, k, s, p, d, density: float) -> None:
    out = tuple((v + 2 * p - d * (k - 1) - 1) // s + 1 for v in size)
    mask = random_mask(3, out, density, seed=k + s)
    want = receptive_field(mask, size, k, s, p, d)
    options = {"kernel_size": k, "stride": s, "padding": p, "dilation": d}
    assert torch.equal(dilate(mask, size, **options), want)
    assert torch.equal(reference.dilate(mask, size, (k, k), (s, s), (p, p), (d, d)), want)


@pytest.mark.parametrize(("stride", "size"), [(1, (4, 5)), (2, (5, 6)), (2, (6, 6))])
def test_marginal_gradient_is_the_change_when_one_position_flips(stride: int, size: tuple[int, int]) -> None:
    out = tuple((v - 1) // stride + 1 for v in size)
    mask = random_mask(2, out, 0.4, seed=3).requires_grad_(True)
    weight = torch.randn(2, 1, *size, generator=torch.Generator().manual_seed(0))
    (dilate(mask, size, stride=stride, gradient="marginal") * weight).sum().backward()
    for n, y, x in itertools.product(range(2), range(out[0]), range(out[1])):
        on, off = mask.detach().clone(), mask.detach().clone()
        on[n, 0, y, x], off[n, 0, y, x] = 1, 0
        change = ((dilate(on, size, stride=stride) - dilate(off, size, stride=stride)) * weight).sum()
        assert mask.grad[n, 0, y, x] == pytest.approx(float(change), abs=1e-5)


def test_max_gradient_flows_and_none_does_not() -> None:
    mask = random_mask(1, (5, 5), 0.3).requires_grad_(True)
    assert not dilate(mask, (5, 5)).requires_grad
    dilate(mask, (5, 5), gradient="max").sum().backward()
    assert mask.grad.abs().sum() > 0


@given(st.floats(-3, 3), st.sampled_from([0.5, 1.0, 5.0]))
def test_probability_of_open_is_the_sigmoid_whatever_the_temperature(
    logit: float, temperature: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    z = torch.full((1, 1, 100, 200), logit)
    share = gumbel_mask(z, temperature=temperature, generator=generator).mean()
    p = torch.sigmoid(torch.tensor(logit))
    assert abs(share - p) < 4.5 * (p * (1 - p) / z.numel()).sqrt() + 1e-6


def test_noise_is_finite_and_float32_for_half_precision() -> None:
    z = torch.zeros(1, 1, 300, 300, dtype=torch.bfloat16)
    noise = reference.sample_logistic(z)
    assert noise.dtype == torch.float32 and bool(noise.isfinite().all())
    assert noise.std() == pytest.approx(3.14159 / 3**0.5, rel=0.02)
    assert gumbel_mask(z).dtype == torch.float32


def test_fast_and_reference_sampling_agree_in_value_and_gradient() -> None:
    z = torch.randn(2, 1, 5, 7, dtype=torch.float64, requires_grad=True)
    noise = torch.randn_like(z)
    v = torch.randn_like(z)
    fast = gumbel_mask(z, temperature=0.7, noise=noise)
    (g1,) = torch.autograd.grad((fast * v).sum(), z)
    slow = reference.gumbel_mask(z, noise, 0.7)
    (g2,) = torch.autograd.grad((slow * v).sum(), z)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(g1, g2)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("batch", [1, 3])
def test_mask_convolution(size, stride: int, batch: int) -> None:
    x, w = torch.randn(batch, 5, *size), torch.randn(1, 5, 3, 3)
    torch.testing.assert_close(
        conv3x3_to_one(x, nine_taps(w), stride), F.conv2d(x, w, None, stride, 1), atol=1e-5, rtol=1e-5
    )


def test_granularity_repeats_and_crops() -> None:
    mask = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]])
    up = upsample_mask(mask, 2, (3, 3))
    assert up.tolist() == [[[[1, 1, 0], [1, 1, 0], [0, 0, 1]]]]


def test_unknown_gradient_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match="did you mean 'marginal'"):
        dilate(torch.ones(1, 1, 2, 2), (2, 2), gradient="marginall")
