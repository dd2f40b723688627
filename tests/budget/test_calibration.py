"""Exact budgets after training: reached, stored, interpolated, restored on failure."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import dynaconv as dc
from dynaconv.budget.calibration import CalibrationReport, calibrated_densities


@pytest.fixture
def model(seed: int) -> torch.nn.Module:
    return dc.create_model("dynconv_resnet14_cifar", masking=dc.SpatialMasking(preset="paper")).eval()


def images(count: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 3, 32, 32, generator=generator) for _ in range(count // 16)]


def ratio(model: torch.nn.Module, batches: list[torch.Tensor]) -> float:
    values = []
    with torch.no_grad():
        for x in batches:
            with dc.collect_masks(model) as masks:
                model(x)
            values.append(masks.conditional_ratio())
    return float(torch.cat(values).mean())


def test_targets_are_met_here_and_on_held_out_images(model) -> None:
    report = dc.calibrate_(model, images(64, 1), targets=(0.3, 0.5, 0.7))
    assert isinstance(report, CalibrationReport) and "passes" in report.table()
    for row in report.rows:
        assert abs(row["ratio"] - row["target"]) <= 1e-3
    held_out = images(64, 2)
    for target in (0.3, 0.5, 0.7):
        dc.set_budget_(model, target)
        assert abs(ratio(model, held_out) - target) <= 0.02
    dc.set_budget_(model, 0.42)
    assert abs(ratio(model, held_out) - 0.42) <= 0.02
    assert dc.calibrated_targets(model) == [0.3, 0.5, 0.7]


def test_logits_far_from_zero_are_calibrated_too(model) -> None:
    for gate in dc.gates(model).values():
        with torch.no_grad():
            for parameter in gate.parameters():
                parameter.mul_(20.0)
    report = dc.calibrate_(model, images(64, 1), targets=(0.2, 0.9), spacing=1.0)
    assert min(abs(row["threshold"]) for row in report.rows) > 20
    assert all(abs(row["error"]) <= 1e-3 for row in report.rows)


def test_calibration_survives_saving_copying_and_state_dicts(model, tmp_path) -> None:
    dc.calibrate_(model, images(16, 1), targets=(0.4, 0.6))
    thresholds = [dc.set_budget_(model, t) for t in (0.4, 0.5, 0.6)]
    dc.save(model, tmp_path / "model")
    loaded = dc.load(tmp_path / "model")
    for other in (loaded, copy.deepcopy(model)):
        assert [dc.set_budget_(other, t) for t in (0.4, 0.5, 0.6)] == thresholds
        assert dc.calibrated_targets(other) == [0.4, 0.6]


def test_densities_of_every_gate_are_kept(model) -> None:
    assert calibrated_densities(model) is None
    batches = images(32, 1)
    dc.calibrate_(model, batches, targets=(0.4, 0.6))
    known = {}
    for target in (0.4, 0.6):
        dc.set_budget_(model, target)
        opened = dict.fromkeys(dc.gates(model), 0.0)
        for x in batches:
            with torch.no_grad(), dc.collect_masks(model) as masks:
                model(x)
            for name, mask in masks.items():
                opened[name] += float(mask.densities.sum()) / 32
        known[target] = calibrated_densities(model)
        assert known[target] == pytest.approx(opened, abs=1e-5)
    dc.set_budget_(model, 0.5)
    between = calibrated_densities(model)
    assert all(known[0.4][name] - 1e-6 <= share <= known[0.6][name] + 1e-6 for name, share in between.items())
    dc.set_budget_(model, 1.0)
    assert set(calibrated_densities(model).values()) == {1.0}
    next(iter(dc.gates(model).values())).threshold.fill_(99.0)
    assert calibrated_densities(model) is None


def test_ends_of_the_dial(model) -> None:
    x = images(16, 1)
    assert dc.set_budget_(model, 1.0) == -math.inf
    assert ratio(model, x) == 1.0
    assert dc.set_budget_(model, None) == 0.0


def test_a_loader_of_pairs_and_the_mode_is_kept(model) -> None:
    model.train()
    pairs = [(x, torch.zeros(len(x))) for x in images(16, 1)]
    assert dc.calibrate_(model, pairs, targets=(0.5,)).images == 16
    assert model.training and all(m.training for m in model.modules())


def test_failure_leaves_the_thresholds_alone(model) -> None:
    for gate in dc.gates(model).values():
        gate.threshold.fill_(0.25)
    with pytest.raises(ValueError, match="got no images"):
        dc.calibrate_(model, [], targets=(0.5,))
    assert all(float(g.threshold) == 0.25 for g in dc.gates(model).values())


@pytest.mark.parametrize("target", [0.0, 1.5, -1])
def test_targets_outside_the_unit_interval(model, target: float) -> None:
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\]"):
        dc.calibrate_(model, images(16, 1), targets=(target,))
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\]"):
        dc.set_budget_(model, target)


def test_targets_out_of_order_named_twice_or_on_one_image(model) -> None:
    for targets in ((0.5, 0.3), (0.3, 0.3, 0.5)):
        with pytest.raises(ValueError, match=r"targets must rise and differ, got .*; write 0\.3, 0\.5"):
            dc.calibrate_(model, images(16, 1), targets=targets)
    with pytest.raises(ValueError, match="got one image, whose masks say nothing about others"):
        dc.calibrate_(model, [images(16, 1)[0][:1]], targets=(0.5,))
    with pytest.raises(ValueError, match="at least one target"):
        dc.calibrate_(model, images(16, 1), targets=())


def test_asking_too_early_or_out_of_range(model) -> None:
    with pytest.raises(ValueError, match="not calibrated yet"):
        dc.set_budget_(model, 0.5)
    dc.calibrate_(model, images(16, 1), targets=(0.5, 0.6))
    with pytest.raises(ValueError, match=r"outside the calibrated range 0\.500\.\.0\.600"):
        dc.set_budget_(model, 0.2)
    with pytest.raises(ValueError, match="no gates"):
        dc.set_budget_(dc.create_model("resnet8_cifar"), 0.5)
