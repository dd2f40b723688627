"""Halting, channel gates and narrowed networks in the engine: native, right at every decision, and really skipped."""

from __future__ import annotations

import pytest
import torch
from tests.convert.networks import randomise_norms, small_block
from tests.engine.networks import Lambda
from tests.gates.networks import gated, images
from torch import nn

import dynaconv as dc
from dynaconv.engine import CompiledModel, runtime
from dynaconv.ops import _native
from dynaconv.testing import force_masks

BACKENDS = ["eager"] if _native.missing() else ["eager", "cpu"]


def worst_error(model: nn.Module, x: torch.Tensor, densities: tuple[float | None, ...]) -> float:
    """Of the compiled network, over backends, batch sizes, thread counts and densities; None: as the gates decide."""
    error, threads = 0.0, torch.get_num_threads()
    try:
        first = dc.compile(model, (x[:3],), measure=False)
        for backend in BACKENDS:
            fast = CompiledModel(first.plan.raw, first._out_spec, backend=backend, source=model)
            assert fast.plan.aten == []
            for n, count in ((1, 1), (len(x), 1), (3, 2)):
                torch.set_num_threads(count)
                # Two threads on a busy machine wait for each other at every step.
                for density in densities if count == 1 else densities[-2:-1]:
                    error = max(error, _error(model, fast, x[:n], density))
    finally:
        torch.set_num_threads(threads)
    return error


def _error(model: nn.Module, fast, x: torch.Tensor, density: float | None) -> float:
    with torch.no_grad():
        if density is None:
            want, got = model(x), fast(x)
        else:
            with force_masks(model, density):
                want, got = model(x), fast(x)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", ["sact", "act", "channels"])
def test_gates_that_are_no_masks_run_natively(kind: str) -> None:
    assert worst_error(gated(kind, width=12), images(8, 3), (None, 0.0, 0.4, 1.0)) <= 1e-5


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("basic", 1),
        ("basic_s2", 4),
        ("bottleneck_s2", 4),
        ("bottleneck_groups", 2),
        ("inverted", 4),
        ("inverted", 1),
    ],
)
def test_only_open_channels_are_computed(kind: str, groups: int) -> None:
    torch.manual_seed(groups)
    block = small_block(kind, dc.ChannelGate(groups=groups)).eval()
    channels = block.convs[0].in_channels
    # A picture is read in its own way; the block reads a map.
    model = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.ReLU(), block)
    x = torch.randn(8, 3, 13, 10)
    assert worst_error(model.eval(), x, (None, 0.0, 0.3, 0.6, 1.0)) <= 1e-5
    steps = [s["kernel"] for s in dc.compile(model, (x,), measure=False, backend="eager").plan.steps]
    assert "multiply" not in steps and steps.count("narrow") == (
        1 if kind == "inverted" else len(block.convs)
    )


def test_panels_of_channels_that_no_vector_fits() -> None:
    """Hidden maps of 60 and 96 channels: groups end within panels, and the last panel is not full."""
    from dynaconv.models import BasicBlock

    for hidden, groups in ((60, 5), (96, 6)):
        torch.manual_seed(hidden)
        model = nn.Sequential(nn.Conv2d(3, hidden, 3, padding=1), randomise_norms(BasicBlock(hidden, hidden)))
        dc.dynamize_(model, dc.ChannelGate(groups=groups))
        assert worst_error(model.eval(), torch.randn(4, 3, 9, 9), (0.0, 0.5, 1.0)) <= 1e-5


def test_the_dial_of_compiled_channel_gates_turns() -> None:
    model, x = gated("channels"), images(6, 5)
    dc.calibrate_(model, [images(64)], targets=(0.3, 0.7))
    fast = dc.compile(model, (x,), measure=False)
    for target in (0.3, 0.7):
        assert fast.set_budget(target) == pytest.approx(dc.set_budget_(model, target))
        assert _error(model, fast, x, None) <= 1e-5
    with force_masks(fast, 0.5):
        _, stats = fast.run_with_stats(x)
    assert stats.densities == pytest.approx(dict.fromkeys(dc.gates(model), 0.5), abs=0.15)


def test_compiled_channel_gates_verify() -> None:
    """Channels that no image opens hold anything, and are not compared."""
    model, x = gated("channels"), images(6, 5)
    for dtype in (None, *([torch.bfloat16] if runtime.missing_bfloat16() is None else [])):
        fast = dc.compile(model, (x,), measure=False, dtype=dtype)
        assert any(s["kernel"] == "narrow" for s in fast.plan.steps)
        assert fast.verify((x,), **({} if dtype is None else {"tolerance": 0.1}))["worst_error"] <= 1e-2


def test_a_narrowed_network_has_narrower_weights() -> None:
    model, x = gated("narrow", width=16), images(3, 2)
    assert worst_error(model, x, (None,)) <= 1e-5
    raw = dc.compile(model, (x,), measure=False, backend="eager").plan.raw
    narrow = sum(c.in_channels * c.out_channels for c in raw.convs if c.form == "conv")
    dc.set_budget_(model, 1.0)
    whole = dc.compile(model, (x,), measure=False, backend="eager").plan.raw
    assert narrow < 0.8 * sum(c.in_channels * c.out_channels for c in whole.convs if c.form == "conv")
    profile = dc.profile(model, x)
    assert float(profile.executed_macs[0]) == profile.dense_macs


def test_what_reads_hidden_channels_otherwise_gets_them_all() -> None:
    """The hidden map is an output, too: its channels stay where they are, times the decision."""

    def forward(m, x):
        y = m.first(x)
        open_ = (m.score(y.mean((2, 3)))[:, :, None, None] >= 0.0).to(y.dtype).repeat_interleave(4, 1)
        hidden = open_ * m.second(y).relu()
        return m.third(hidden), hidden

    torch.manual_seed(0)
    parts = {"first": nn.Conv2d(3, 8, 3), "second": nn.Conv2d(8, 16, 3), "third": nn.Conv2d(16, 8, 1)}
    model, x = Lambda(forward, score=nn.Linear(8, 4), **parts).eval(), torch.randn(5, 3, 11, 9)
    for backend in BACKENDS:
        fast = dc.compile(model, (x,), measure=False, backend=backend)
        kernels = [s["kernel"] for s in fast.plan.steps]
        assert fast.plan.aten == [] and "multiply" in kernels and "narrow" not in kernels
        with torch.no_grad():
            for got, want in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_constants_of_a_maps_size_stay_right() -> None:
    """Ones and zeros that broadcast are numbers; what reads their shape sees the shape."""

    def forward(m, x):
        y = m.conv(x)
        ones = torch.ones_like(y[:, :1])
        grown = (1 - ones * 0.25) * y[:, :1] + ones
        return torch.cat([grown, torch.ones_like(y)], 1), (3 - y) - 0.5 * (y - y.relu()), torch.zeros_like(y)

    model, x = Lambda(forward, conv=nn.Conv2d(3, 4, 3)).eval(), torch.randn(3, 3, 8, 7)
    for backend in BACKENDS:
        fast = dc.compile(model, (x,), measure=False, backend=backend)
        with torch.no_grad():
            for got, want in zip(fast(x), model(x), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["sact", "channels", "narrow"])
def test_saved_plans_run_the_same(kind: str, tmp_path) -> None:
    model, x = gated(kind), images(3, 6)
    fast = dc.compile(model, (x,), measure=False)
    assert torch.equal(dc.engine.load(fast.save(tmp_path / "plan"))(x), fast(x))
