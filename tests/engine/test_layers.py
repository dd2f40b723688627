"""Single layers and masked blocks of any shape, density, batch size and number of threads, against eager mode."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import gates
from dynaconv.engine import CompiledModel, runtime
from dynaconv.models import BasicBlock
from dynaconv.testing import assert_agree, force_masks

pytestmark = pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")
CHANNELS = st.sampled_from([1, 2, 3, 8, 15, 16, 17, 32, 33, 48, 70])
ACTIVATIONS = st.sampled_from([nn.Identity, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU])
SIZES = st.tuples(st.integers(1, 15), st.integers(1, 15))
IMAGES = st.integers(1, 4)
THREADS = st.integers(1, 3)


@st.composite
def convolutions(draw) -> tuple[nn.Module, tuple[int, int, int]]:
    """A convolution with batch norm and activation behind a 1x1, and the size of an image that it can take."""
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 0]))
    inner = draw(CHANNELS) * max(groups, 1)
    groups = groups or inner
    out = groups * draw(st.sampled_from([1, 1, 2, 5, 16, 33]) if groups < 8 else st.sampled_from([1, 1, 2]))
    kernel, dilation = draw(st.tuples(*[st.sampled_from([1, 2, 3, 3, 5, 7])] * 2)), draw(st.integers(1, 2))
    stride, padding = draw(st.tuples(st.integers(1, 3), st.integers(1, 3))), draw(st.integers(0, 3))
    reach = [dilation * (k - 1) + 1 - 2 * padding for k in kernel]
    size = tuple(max(n, r) for n, r in zip(draw(SIZES), reach, strict=True))
    conv = nn.Conv2d(inner, out, kernel, stride, padding, dilation, groups, bias=draw(st.booleans()))
    parts = [nn.Conv2d(3, inner, 1), conv]
    parts += [nn.BatchNorm2d(out)] * draw(st.booleans()) + [draw(ACTIVATIONS)()]
    return randomise_norms(nn.Sequential(*parts)).eval(), (3, *size)


@st.composite
def blocks(draw) -> tuple[nn.Module, tuple[int, int, int]]:
    """A masked residual block of two convolutions behind a 1x1."""
    inner, out = draw(CHANNELS), draw(CHANNELS)
    stride = draw(st.integers(1, 2))
    config = dc.SpatialMasking(
        preset="paper",
        granularity=draw(st.integers(1, 3)),
        unit=draw(st.sampled_from(["squeeze", "conv1x1"])),
    )
    block = nn.Sequential(BasicBlock(inner, inner if stride == 1 else out, stride))
    dc.dynamize_(block, config)
    model = nn.Sequential(nn.Conv2d(3, inner, 1), block)
    return randomise_norms(model).eval(), (3, *draw(SIZES))


def agree(fast: CompiledModel, model: nn.Module, x: Tensor) -> Tensor:
    """The compiled result, compared with the network's and with the compiled one once more."""
    with torch.no_grad():
        expected = model(x)
    y = fast(x)
    assert_agree(y, expected)
    assert torch.equal(fast(x), y)
    return y


@given(drawn=convolutions(), n=IMAGES, threads=THREADS)
def test_any_convolution(drawn: tuple, n: int, threads: int) -> None:
    model, size = drawn
    x = torch.randn(n, *size)
    fast = dc.compile(model, (x[:1],), backend="cpu", threads=threads, measure=False)
    assert fast.plan.aten == []
    y = agree(fast, model, x)
    if n > 1:
        assert_agree(fast(x[1:]), y[1:])


@given(drawn=blocks(), n=IMAGES, threads=THREADS, seed=st.integers(0, 9), share=st.floats(0, 1))
def test_any_masked_block(drawn: tuple, n: int, threads: int, seed: int, share: float) -> None:
    model, size = drawn
    x = torch.randn(n, *size)
    fast = dc.compile(model, (x,), backend="cpu", threads=threads, measure=False)
    # On a map of one position a mask is a number like others.
    assert max(size[1:]) <= 2 or (fast.plan.aten == [] and len(fast.gates) == len(gates(model)) == 1)
    for density in (0.0, share, 1.0):
        with force_masks(model, density, seed):
            agree(fast, model, x)


@given(size=SIZES, stride=st.integers(1, 2), kernel=st.sampled_from([3, 5]), ratio=st.sampled_from([1, 3, 6]),
       share=st.floats(0, 1), n=IMAGES, threads=THREADS, act=ACTIVATIONS)  # fmt: skip
def test_any_inverted_residual(size, stride, kernel, ratio, share, n, threads, act) -> None:
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.models.mobilenetv2 import InvertedResidual

    block = InvertedResidual(32, 32, stride, ratio)
    depthwise = block.conv[-3][0]
    block.conv[-3][0] = nn.Conv2d(
        depthwise.in_channels,
        depthwise.out_channels,
        kernel,
        stride,
        kernel // 2,
        groups=depthwise.groups,
        bias=False,
    )
    block.conv[-3][-1] = act()
    holder = nn.Sequential(block)
    if stride == 1:
        dc.dynamize_(holder, dc.SpatialMasking(preset="paper"))
    model = randomise_norms(nn.Sequential(nn.Conv2d(3, 32, 1), holder)).eval()
    x = torch.randn(n, 3, *size)
    fast = dc.compile(model, (x,), backend="cpu", threads=threads, measure=False)
    assert max(size) <= 2 or fast.plan.aten == []
    with force_masks(model, share) if stride == 1 else nullcontext():
        agree(fast, model, x)
