"""What holds for every gate type: skipping changes nothing, counting is exact, saving, compiling, exporting."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.gates.networks import GATES, gated, images, static
from torch import nn

import dynaconv as dc
from dynaconv.testing import assert_agree, force_masks

KINDS = list(GATES)
each_gate = pytest.mark.parametrize("kind", KINDS)


def run(model: nn.Module, x: torch.Tensor, backend: str = "auto", break_even: float | None = None):
    blocks = dc.masked_blocks(model).values()
    for block in blocks:
        block.backend, block.break_even = backend, break_even
    with torch.no_grad():
        return model(x)


@each_gate
def test_skipping_equals_the_dense_masked_network(kind: str) -> None:
    model, x = gated(kind), images(6, 9)
    want = run(model, x, "eager")
    for density in (None, 0.0, 0.5, 1.0):
        if density is None:
            assert_agree(run(model, x, break_even=2.0), want, "network")
            continue
        with force_masks(model, density):
            assert_agree(run(model, x, break_even=2.0), run(model, x, "eager"), "network")


@each_gate
def test_fully_open_gates_are_the_static_network_and_revert_restores_it(kind: str) -> None:
    model = gated(kind)
    original = copy.deepcopy(model)
    x = images(3, 5)
    dc.revert_(original)
    assert [type(m) for m in original.modules()] == [type(m) for m in static().modules()]
    assert list(original.state_dict()) == list(static().state_dict())
    dc.set_budget_(model, 1.0)
    with torch.no_grad():
        assert_agree(model(x), original.eval()(x), "network") if kind not in ("sact", "act") else None


@each_gate
def test_gradients_of_skipping_equal_those_of_the_dense_form(kind: str) -> None:
    model, x = gated(kind), images(4, 3)
    found = []
    for backend in ("auto", "eager"):
        for block in dc.masked_blocks(model).values():
            block.backend, block.break_even = backend, 2.0
        model.zero_grad()
        model(x).pow(2).sum().backward()
        found.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None and ".gate." not in n}
        )
    for name, grad in found[1].items():
        assert_agree(found[0][name], grad, "network")


@each_gate
def test_images_do_not_depend_on_their_batch(kind: str) -> None:
    model, x = gated(kind), images(6, 2)
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert_agree(run(model, x[order]), run(model, x)[order], "network")
    assert_agree(run(model, x[2:3]), run(model, x)[2:3], "network")


@each_gate
def test_saving_loading_and_copying(kind: str, tmp_path) -> None:
    model, x = gated(kind), images(4, 1)
    want = run(model, x)
    dc.calibrate_(model, [images(16)], targets=(0.4, 0.6))
    budgets = [dc.set_budget_(model, t) for t in (0.4, 0.5, 0.6)]
    dc.save(model, tmp_path / "model")
    loaded = dc.load(tmp_path / "model")
    for other in (loaded, copy.deepcopy(model)):
        assert [dc.set_budget_(other, t) for t in (0.4, 0.5, 0.6)] == budgets
        assert_agree(run(other, x), run(model, x), "network")
    dc.set_budget_(loaded, None)
    if kind not in ("sact", "act"):
        assert_agree(run(loaded, x), want, "network")
    assert [b.config for b in dc.masked_blocks(loaded).values()] == [GATES[kind]] * len(dc.gates(model))


@each_gate
def test_profile_collects_and_maps(kind: str) -> None:
    model, x = gated(kind), images(5, 8)
    with torch.no_grad(), dc.collect_masks(model) as masks:
        model(x)
    assert list(masks) == list(dc.gates(model)) and all(m.shape[:2] == (5, 1) for m in masks.values())
    profile = dc.profile(model, x)
    ratio = masks.conditional_ratio()
    assert 0 < float(ratio.mean()) < 1
    fixed = profile.dense_macs - profile.conditional_macs
    want = fixed + profile.routing_macs + ratio * profile.conditional_macs
    torch.testing.assert_close(profile.executed_macs, want, rtol=1e-9, atol=0.5)
    total = dc.mac_density_map(masks, (16, 16)).mean((1, 2)).double()
    torch.testing.assert_close(total, ratio, rtol=1e-5, atol=1e-5)
    with force_masks(model, 1.0):
        opened = dc.profile(model, x)
    torch.testing.assert_close(
        opened.executed_macs - opened.routing_macs, torch.full((5,), float(profile.dense_macs)).double()
    )


@each_gate
def test_compiled_and_exported(kind: str, tmp_path) -> None:
    model, x = gated(kind), images(3, 4)
    dc.calibrate_(model, [images(32)], targets=(0.4, 0.6))
    want = run(model, x)
    exported = torch.export.export(model, (x,), strict=False).module()
    assert_agree(exported(x).detach(), want, "network")
    fast = dc.compile(model, (x,), measure=False)
    assert_agree(fast(x), want, "network")
    assert (fast.plan.aten == []) == (kind != "random")
    assert all(step.reason for step in fast.plan.raw.aten)
    fast.save(tmp_path / "plan")
    assert_agree(dc.engine.load(tmp_path / "plan")(x), want, "network")
    if kind == "narrow":
        with force_masks(model, 0.5), pytest.raises(ValueError, match="cannot follow them"):
            fast(x)
    else:
        with force_masks(model, 0.5):
            assert_agree(fast(x), run(model, x), "network")
    if kind in ("sact", "act", "narrow"):
        with pytest.raises(ValueError, match=r"compiled in; call dc\.set_budget_"):
            fast.set_budget(0.5)
    else:
        fast.set_budget(0.5)
        dc.set_budget_(model, 0.5)
        assert_agree(fast(x), run(model, x), "network")


@each_gate
def test_budgets_are_met_here_and_on_held_out_images(kind: str) -> None:
    model = gated(kind, width=16 if kind == "narrow" else 4)
    targets = (0.2, 0.5, 0.9)
    count = 4 if kind == "narrow" else 512
    here, held_out = [images(count, 11)], images(count, 12)
    report = dc.calibrate_(model, here, targets=targets)
    assert all(abs(row["error"]) <= 0.01 for row in report.rows), str(report)
    for target in (*targets, 0.42, 0.7):
        dc.set_budget_(model, target)
        with torch.no_grad(), dc.collect_masks(model) as masks:
            model(held_out)
        assert abs(float(masks.conditional_ratio().mean()) - target) <= 0.02, target
