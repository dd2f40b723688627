"""The compiled kernel that mixes while packing, against the definition."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from dynaconv.ops import _native, dynamic_conv2d, mix_kernels
from dynaconv.ops.dynamic_conv2d import compiled, reference
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry

pytestmark = pytest.mark.skipif(_native.missing() is not None, reason="the compiled kernels are not built")

SHAPES = [
    (3, 5, (3, 3), 1, 1, 1),
    (16, 40, (3, 3), 2, 1, 1),
    (33, 64, (5, 3), 1, (4, 2), 2),
    (8, 96, (1, 1), 2, 0, 1),
    (7, 31, (3, 3), (1, 2), (0, 2), 1),
]
SIZES = [(1, 9, 7), (3, 11, 13), (2, 30, 30)]


def _case(shape, size, experts: int, by_channel: bool, taps: bool, channels_last: bool):
    torch.manual_seed(0)
    (i, o, kernel, stride, padding, dilation), (n, h, w) = shape, size
    geometry = ConvGeometry.of(2, stride, padding, dilation, 1)
    x, weight = torch.randn(n, i, h, w), torch.randn(experts, o, i, *kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    routing = torch.rand(n, o, experts) if by_channel else torch.rand(n, experts)
    scale = torch.rand(n, kernel[0] * kernel[1]) if taps else None
    return x, weight, routing, (torch.randn(experts, o), torch.randn(o)), scale, geometry


def _expected(x, weight, routing, biases, scale, geometry):
    y = reference.per_sample_conv(x, mix_kernels(weight, routing, scale), geometry)
    return y + reference.mix_biases(biases[0], routing)[:, :, None, None] + biases[1][:, None, None]


def _run(x, weight, routing, biases, scale, geometry, packed=None):
    panels = (packed or PackedExperts()).panels(weight)
    return compiled.dynamic_conv(x, weight, routing, *biases, scale, geometry, panels)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("experts", "by_channel", "taps"), [(3, False, False), (4, True, False), (8, False, True)]
)
@pytest.mark.parametrize("channels_last", [False, True])
def test_it_computes_what_the_definition_says(shape, size, experts, by_channel, taps, channels_last):
    case = _case(shape, size, experts, by_channel, taps, channels_last)
    expected, y = _expected(*case), _run(*case)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


@pytest.mark.parametrize("channels", [5, 16, 40])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation"),
    [((3, 3), 1, 1, 1), ((5, 3), 1, (0, 2), 2), ((3, 3), 2, 1, 1)],
)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("by_channel", "taps"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_depthwise(channels, kernel, stride, padding, dilation, size, by_channel, taps, channels_last):
    torch.manual_seed(0)
    n, h, w = size
    geometry = ConvGeometry.of(2, stride, padding, dilation, channels)
    x, weight = torch.randn(n, channels, h, w), torch.randn(3, channels, 1, *kernel)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    elif stride != 1:
        assert "steps of one" in compiled.cannot_run(x, weight, channels, stride)
        return
    routing = torch.rand(n, channels, 3) if by_channel else torch.rand(n, 3)
    biases = torch.randn(3, channels), torch.randn(channels)
    case = x, weight, routing, biases, torch.rand(n, kernel[0] * kernel[1]) if taps else None, geometry
    expected, y = _expected(*case), _run(*case)
    assert (y - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_packed_experts_notice_that_they_changed():
    x, weight, routing, biases, _, geometry = _case(SHAPES[0], SIZES[1], 3, False, False, False)
    packed = PackedExperts()
    first = packed.panels(weight)
    assert packed.panels(weight) is first
    weight.mul_(2)
    y = _run(x, weight, routing, biases, None, geometry, packed)
    torch.testing.assert_close(y, _expected(x, weight, routing, biases, None, geometry), rtol=1e-4, atol=1e-4)


def test_copies_leave_the_packed_weights_behind():
    packed = PackedExperts()
    packed.panels(torch.randn(2, 4, 3, 3, 3))
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert other._made is None


def test_it_says_what_it_cannot_run():
    weight = torch.zeros(2, 4, 4, 3, 3)
    assert compiled.cannot_run(torch.zeros(1, 4, 5, 5), weight, 1) is None
    assert "in one group" in compiled.cannot_run(torch.zeros(1, 8, 5, 5), weight, 2)
    assert "float32" in compiled.cannot_run(torch.zeros(1, 4, 5, 5, dtype=torch.float64), weight, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "autocast" in compiled.cannot_run(torch.zeros(1, 4, 5, 5), weight, 1)


def test_a_bias_that_alone_needs_a_gradient_gets_one():
    x, weight, routing, _, _, geometry = _case(SHAPES[0], SIZES[1], 3, False, False, False)
    bias = torch.zeros(weight.shape[1], requires_grad=True)
    dynamic_conv2d(x, weight, routing, padding=1, static_bias=bias, packed=PackedExperts()).sum().backward()
    assert bias.grad is not None and bool((bias.grad != 0).all())
