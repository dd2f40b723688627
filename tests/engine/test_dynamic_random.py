"""Layers with a kernel for each image, drawn at random: compiled and interpreted they give what eager gives."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from tests.convert.networks import randomise_norms
from tests.engine.networks import Lambda, exact_convolutions, poisoned
from tests.engine.test_networks import check
from torch import nn

import dynaconv as dc
import dynaconv.nn as dnn
from dynaconv.engine import runtime

ACTIVATIONS = [nn.Identity, nn.ReLU, nn.ReLU6, nn.Hardswish]
FAMILIES = {
    "condconv": (dnn.CondConv2d, {"num_experts": st.integers(1, 9)}),
    "dyconv": (dnn.DYConv2d, {"num_kernels": st.integers(1, 5)}),
    "dynet": (dnn.DyNetConv2d, {"group_size": st.integers(1, 6), "hidden": st.sampled_from([None, 3])}),
    "odconv": (
        dnn.ODConv2d,
        {"num_kernels": st.integers(1, 4), "norm": st.sampled_from(["batch", "layer", "none"])},
    ),
    "dcd": (
        dnn.DCDConv2d,
        {
            "latent_channels": st.sampled_from([None, 1, 7, 33]),
            "pool_size": st.sampled_from([None, 1, 2, 3]),
            "norm": st.sampled_from(["batch", "none"]),
        },
    ),
    "weightnet": (
        dnn.WeightNetConv2d,
        {"num_coefficients": st.sampled_from([2, 4]), "num_blocks": st.just(2)},
    ),
}


@st.composite
def layer(draw) -> nn.Module:
    """A layer of any family, its norm and activation; a shortcut where the shapes allow it."""
    torch.manual_seed(draw(st.integers(0, 99)))
    family = draw(st.sampled_from(sorted(FAMILIES)))
    kind, extras = FAMILIES[family]
    groups = draw(st.sampled_from([1, 1, 1, 2, 4]))
    inputs, outputs = (groups * draw(st.integers(1, 40 // groups)) for _ in range(2))
    if family != "dcd" and draw(st.booleans()) and inputs > 1:
        groups = outputs = inputs
    kernel = draw(st.sampled_from([1, 1, 2, 3, 3, 5]))
    # DCD's low-rank part is dense; a row of WeightNet's kernel has two halves.
    assume(family != "dcd" or groups == 1 or groups < inputs)
    assume(family != "weightnet" or groups == inputs or inputs // groups * kernel**2 % 2 == 0)
    options = {name: draw(values) for name, values in extras.items()}
    conv = kind(
        inputs, outputs, kernel, stride=draw(st.integers(1, 3)), padding=draw(st.integers(0, 3)),
        dilation=draw(st.integers(1, 2)), groups=groups, bias=draw(st.booleans()), **options,
    )  # fmt: skip
    norm = draw(st.sampled_from([nn.Identity(), nn.BatchNorm2d(outputs)]))
    act, last = (draw(st.sampled_from(ACTIVATIONS))() for _ in range(2))
    stem = nn.Conv2d(3, inputs, 1)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = m.stem(x)
        y = m.act(m.norm(m.conv(x)))
        return m.last(y + x if y.shape == x.shape else y)

    parts = {"stem": stem, "conv": conv, "norm": norm, "act": act, "last": last}
    return randomise_norms(Lambda(forward, **parts)).eval()


@given(model=layer(), n=st.integers(1, 5), size=st.sampled_from([(7, 7), (9, 4), (14, 13)]))
def test_any_layer(model: nn.Module, n: int, size: tuple[int, int]) -> None:
    x = torch.randn(n, 3, *size)
    try:
        model(x)
    except RuntimeError as error:
        assume("can't be greater than" not in str(error))
        raise
    with exact_convolutions():
        interpreted = poisoned(model, x)
        assert interpreted.plan.aten == []
        check(interpreted, model, x)
    if runtime.missing() is None:
        check(dc.compile(model, (x,), backend="cpu", measure=False), model, x)
