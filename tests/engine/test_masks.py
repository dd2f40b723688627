"""Masked networks: the compiled one computes open rows only, and gives what the dense definition gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.convert.networks import randomise_norms, small_block
from tests.engine.networks import SIZE, Lambda, conv_bn, exact_convolutions, poisoned
from tests.engine.test_networks import BACKENDS, check
from torch import nn

import dynaconv as dc
from dynaconv.convert import SpatialMasking
from dynaconv.engine.compiler import make_plan
from dynaconv.ops.mask_ops import mask_logits
from dynaconv.testing import force_masks

KINDS = ["basic", "basic_s2", "bottleneck", "bottleneck_s2", "bottleneck_groups", "inverted"]


def masked(kind: str, **options) -> nn.Module:
    """A stem and two masked blocks, the second of another input than the first."""
    block = small_block(kind, SpatialMasking(preset="paper", **options))
    channels = block.convs[0].in_channels
    return nn.Sequential(conv_bn(3, channels, act=nn.ReLU()), block, nn.AvgPool2d(2)).eval()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_blocks_match(kind: str, backend: str) -> None:
    model = masked(kind)
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend)
    assert fast.plan.aten == [] and fast.gates == ["1"]
    assert any(row["choice"] == "sparse" for row in fast.plan.steps)
    x = torch.randn(3, *SIZE)
    for density in (0.0, 0.3, 1.0):
        with force_masks(model, density):
            check(fast, model, x)
    check(fast, model, x)
    assert fast.verify((x,))["reference"] == "eager"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.9])
def test_closed_rows_are_not_needed(kind: str, density: float) -> None:
    model, x = masked(kind), torch.randn(2, *SIZE)
    with exact_convolutions(), force_masks(model, density):
        check(poisoned(model, x), model, x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{"unit": "conv1x1"}, {"granularity": 3}, {"norm": True}, {"granularity": 30, "unit": "conv1x1"}],
)
def test_gates_of_every_kind(options: dict, backend: str) -> None:
    model = randomise_norms(masked("basic_s2", **options))
    fast = dc.compile(model, (torch.randn(1, *SIZE),), backend=backend)
    assert fast.plan.aten == [] and any(row["kernel"] == "gate" for row in fast.plan.steps)
    x = torch.randn(2, *SIZE)
    check(fast, model, x)
    with force_masks(model, 0.4):
        check(fast, model, x)
    fast.verify((x,))


@given(density=st.floats(0, 1), seed=st.integers(0, 99), n=st.integers(1, 4))
def test_any_density(density: float, seed: int, n: int) -> None:
    model, fast = _compiled_once()
    x = torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(seed))
    with force_masks(model, density, seed):
        y = fast(x)
        check(fast, model, x)
    with force_masks(fast, density, seed):
        assert torch.equal(fast(x), y)


_CACHE: list = []


def _compiled_once():
    if not _CACHE:
        model = masked("basic_s2")
        _CACHE.extend([model, dc.compile(model, (torch.randn(1, *SIZE),), measure=False)])
    return _CACHE


def test_forced_masks_are_not_compiled_in() -> None:
    model, x = masked("basic"), torch.randn(2, *SIZE)
    with force_masks(model, 0.5):
        fast = dc.compile(model, (x,), backend="eager")
        check(fast, model, x)
    check(fast, model, x)


def test_stats_count_open_rows() -> None:
    model, x = masked("basic"), torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,))
    with force_masks(fast, 0.5):
        y, stats = fast.run_with_stats(x)
        assert torch.equal(y, fast(x))
    assert stats.images == 2 and stats.open_rows[fast.plan.raw.gates[0].grid] == 2 * round(0.5 * 17 * 13)
    assert stats.densities["1"] == pytest.approx(0.5, abs=0.01)
    assert len(stats.steps) == len(stats.step_ns) == len(fast.plan.steps)


def test_every_call_takes_the_masks_that_are_forced_then() -> None:
    model = masked("basic")
    fast = dc.compile(model, (torch.randn(2, *SIZE),), measure=False)
    images = [torch.randn(n, *SIZE) for n in (2, 1, 3)]

    def expected(density: float) -> list[torch.Tensor]:
        with force_masks(model, density), torch.no_grad():
            return [model(x) for x in images]

    own, other = expected(0.5), expected(0.2)
    for _ in range(2):
        with force_masks(fast, 0.5):
            for x, y in zip(images, own, strict=True):
                torch.testing.assert_close(fast(x), y)
                torch.testing.assert_close(fast(x), y)
            with force_masks(fast, 0.2):
                torch.testing.assert_close(fast(images[0]), other[0])
            torch.testing.assert_close(fast(images[0]), own[0])
        with force_masks(model, 0.2):
            torch.testing.assert_close(fast(images[1]), other[1])
        with torch.no_grad():
            torch.testing.assert_close(fast(images[1]), model(images[1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_shortcuts_that_others_read_survive(backend: str) -> None:
    """Two blocks on one input, whose value is also a result: nothing may be computed in its place."""
    block, other = small_block("basic"), small_block("basic")
    parts = {"stem": conv_bn(3, 8, act=nn.ReLU()), "a": block, "b": other}

    def forward(m: nn.Module, x: torch.Tensor):
        x = m.stem(x)
        return m.a(x) + m.b(x), x

    model, x = Lambda(forward, **parts).eval(), torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,), backend=backend)
    with force_masks(model, 0.4):
        check(fast, model, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shortcut_without_its_activation_gets_it(backend: str) -> None:
    """The block's input is a plain convolution, so relu(x) differs from x where the mask is closed."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), small_block("basic")).eval()
    x = torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,), backend=backend)
    with force_masks(model, 0.4):
        check(fast, model, x)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_that_are_only_multiplied(backend: str) -> None:
    """No shortcut to fall back on: the mask becomes a factor."""
    gate = dc.nn.MaskUnit(8)
    parts = {"stem": conv_bn(3, 8, act=nn.ReLU()), "gate": gate, "conv": conv_bn(8, 4)}

    def forward(m: nn.Module, x: torch.Tensor):
        x = m.stem(x)
        mask = m.gate(x)
        return m.conv(x) * mask, mask

    model, x = Lambda(forward, **parts).eval(), torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,), backend=backend)
    assert fast.plan.aten == []
    check(fast, model, x)


def test_a_chain_of_blocks_needs_no_copies() -> None:
    """Residuals are added in place, with projections split into closed and open rows."""
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, SpatialMasking())
    plan, _ = make_plan(model.eval(), (torch.randn(1, 3, 32, 32),))
    assert not any(step.kind in ("copy", "activate") for step in plan.steps)
    assert sum(step.closed for step in plan.steps) == 2
    for step in plan.steps:
        if step.input2 >= 0:
            assert plan.values[step.input2].storage == plan.values[step.out].storage


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_operators_called_by_name(backend: str) -> None:
    """`nn.MaskedConv2d` and `ops.mask_ops.mask_logits`: sparse with a shortcut, a product without."""
    conv = dc.nn.MaskedConv2d(8, 8, 3, padding=1)
    gate = dc.nn.MaskUnit(8)

    def forward(m: nn.Module, x: torch.Tensor):
        x = m.stem(x)
        logits = mask_logits(
            x, m.gate.conv.weight, m.gate.linear.weight, m.gate.linear.bias + m.gate.conv.bias
        )
        mask = (logits >= 0.0).to(x.dtype)
        return x + m.conv(x, mask), m.conv(x, mask)

    model, x = Lambda(forward, stem=conv_bn(3, 8), conv=conv, gate=gate).eval(), torch.randn(2, *SIZE)
    fast = dc.compile(model, (x,), backend=backend)
    assert fast.plan.aten == []
    assert [row["choice"] for row in fast.plan.steps if row["kernel"].startswith("conv")].count("sparse") == 1
    check(fast, model, x)
