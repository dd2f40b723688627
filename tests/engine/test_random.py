"""Networks drawn at random: whatever the compiler recognises in them, they give the same."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.convert.networks import randomise_norms
from tests.engine.networks import Lambda, conv_bn, exact_convolutions, poisoned, squeeze_excite
from tests.engine.test_networks import check
from torch import nn

import dynaconv as dc
from dynaconv.engine import runtime
from dynaconv.models import BasicBlock

ACTIVATIONS = [None, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.Sigmoid, nn.GELU]


@st.composite
def layer(draw, channels: int) -> tuple[nn.Module, int]:
    """A layer and how many channels come out of it."""
    kind = draw(
        st.sampled_from(
            ["conv", "depthwise", "grouped", "residual", "gated", "pool", "concat", "squeeze", "act", "norm"]
        )
    )
    act = draw(st.sampled_from(ACTIVATIONS))
    act = None if act is None else act()
    if kind == "conv":
        out, k = draw(st.integers(1, 40)), draw(st.sampled_from([1, 2, 3, 5]))
        options = {"stride": draw(st.integers(1, 2)), "dilation": draw(st.integers(1, 2))}
        return conv_bn(channels, out, k, act, padding=k, **options), out
    if kind == "depthwise":
        k = draw(st.sampled_from([3, 5, 7]))
        return conv_bn(channels, channels, k, act, stride=draw(st.integers(1, 2)), groups=channels), channels
    if kind == "grouped":
        out = channels * draw(st.integers(1, 3))
        return conv_bn(channels, out, 3, act, groups=channels if channels % 2 else channels // 2), out
    if kind == "residual":
        body = nn.Sequential(conv_bn(channels, channels, 3, act), conv_bn(channels, channels, 1))
        last = draw(st.sampled_from([nn.Identity(), nn.ReLU()]))
        return Lambda(lambda m, x: m.last(m.body(x) + x), body=body, last=last), channels
    if kind == "gated":
        out = draw(st.sampled_from([channels, channels + 3]))
        stride = 1 if out == channels else 2
        block = nn.Sequential(BasicBlock(channels, out, stride))
        dc.dynamize_(block, dc.SpatialMasking(preset="paper", granularity=draw(st.integers(1, 3))))
        return block, out
    if kind == "pool":
        size, stride = draw(st.integers(2, 3)), draw(st.integers(1, 2))
        pool = draw(st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]))
        return pool(size, stride, draw(st.integers(0, size // 2)), ceil_mode=draw(st.booleans())), channels
    if kind == "concat":
        return Lambda(lambda m, x: torch.cat([x, m.a(x)], 1), a=conv_bn(channels, 5, 3, act)), channels + 5
    if kind == "squeeze":
        return squeeze_excite(channels), channels
    return (act or nn.ReLU()) if kind == "act" else nn.BatchNorm2d(channels), channels


@st.composite
def network(draw) -> nn.Module:
    """One to five layers; two results where the middle one is read again."""
    torch.manual_seed(draw(st.integers(0, 99)))
    channels, layers = 3, []
    for _ in range(draw(st.integers(1, 5))):
        part, channels = draw(layer(channels))
        layers.append(part)
    both = draw(st.booleans())

    def forward(m: nn.Module, x: torch.Tensor):
        middle = m.first(x)
        y = m.second(middle)
        return (y, middle) if both else y

    half = len(layers) // 2
    parts = {"first": nn.Sequential(*layers[:half]), "second": nn.Sequential(*layers[half:])}
    return randomise_norms(Lambda(forward, **parts)).eval()


@given(model=network(), n=st.integers(1, 3), size=st.sampled_from([(9, 8), (14, 14), (17, 6)]))
def test_any_network(model: nn.Module, n: int, size: tuple[int, int]) -> None:
    x = torch.randn(n, 3, *size)
    try:
        model(x)
    except RuntimeError as error:
        # The maps shrank to nothing on the way.
        assume("too small" not in str(error) and "can't be greater than" not in str(error))
        raise
    with exact_convolutions():
        interpreted = poisoned(model, x)
        check(interpreted, model, x, 1e-4)
    if runtime.missing() is None:
        check(dc.compile(model, (x,), backend="cpu", measure=False), model, x, 1e-4)
