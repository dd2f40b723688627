"""Exact budgets after training: one threshold on all mask logits for each target, kept in the network.

Source: our fix for budgets that training alone misses; see docs/concepts.md, "Calibration".
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.convert import gates
from dynaconv.cost.masks import collect_masks

# Logits of trained halting units reach a hundred.
BRACKET = 1000.0
MAX_PASSES = 20


@dataclass
class CalibrationReport:
    """One row a target: target, threshold, ratio reached on the calibration images, error; and passes used."""

    rows: list[dict[str, float]] = field(default_factory=list)
    passes: int = 0
    images: int = 0

    def table(self) -> str:
        """Readable table."""
        rows = [
            (f"{r['target']:.3f}", f"{r['threshold']:+.4f}", f"{r['ratio']:.4f}", f"{r['error']:+.4f}")
            for r in self.rows
        ]
        text = format_table(("target", "threshold", "ratio", "error"), rows, "rrrr")
        return f"{text}\n{self.images} calibration images, {self.passes} passes"

    def __str__(self) -> str:
        return self.table()


def calibrate_(
    model: nn.Module,
    loader: Iterable[Any],
    targets: Sequence[float] = (0.3, 0.5, 0.7),
    *,
    tolerance: float = 1e-3,
    spacing: float = 0.05,
    max_batches: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> CalibrationReport:
    """Find, for every target, the threshold at which the executed share of the conditional MACs meets it.

    The measured pairs (share, threshold) are stored in the gates (`budget_table`), so they survive save and load;
    `set_budget_` then turns one network to any budget between them. Afterwards the network is set to the lowest
    target. Masks of early blocks change what later blocks see, so every candidate threshold is measured by a fresh
    pass over the images, in evaluation mode.

    Args:
        loader: yields x or (x, y, ...), x [N, C, H, W]; 1,000 images or more hold the budget on other images.
        targets: shares in (0, 1], ascending.
        tolerance: accepted error of the share on these images.
        spacing: between the lowest and the highest target, thresholds are measured until neighbouring shares lie at
            most this far apart, so that `set_budget_` has little to interpolate; 1 measures the targets only.
        max_batches: use only the first batches.
        progress: called with one line after every pass.
    Raises:
        ValueError: no gates, fewer than two images, targets outside (0, 1], out of order or named twice, NaN in the
            network's answers. The thresholds are then as they were.

    Returns:
        CalibrationReport. A target that no threshold reaches within the tolerance keeps the nearest one and its error.
    """
    if not gates(model):
        raise _checks.no_gates("calibrate_")
    wanted = _checks.ascending_targets([_checks.fraction("target", t) for t in targets])
    _checks.fraction("spacing", spacing)
    modes = {m: m.training for m in model.modules()}
    before = {name: gate.threshold.clone() for name, gate in gates(model).items()}
    try:
        model.eval()
        meter = _Meter(model, loader, max_batches, progress)
        rows = [_solve(meter, target, tolerance) for target in wanted]
        _fill_gaps(meter, wanted[0], wanted[-1], spacing)
        _store(model, meter, rows)
    except BaseException:
        for name, gate in gates(model).items():
            gate.threshold.copy_(before[name])
        raise
    finally:
        for module, mode in modes.items():
            module.training = mode
    set_budget_(model, wanted[0])
    return CalibrationReport(rows, meter.passes, meter.images)


def set_budget_(model: nn.Module, target: float | None) -> float | None:
    """Turn a calibrated network to a budget, in place.

    Args:
        target: share of the conditional MACs in (0, 1]; between calibrated targets the threshold is interpolated;
            1 opens everything; None goes back to the threshold of training (0).
    Returns:
        The threshold that was set (-inf for 1).
    Raises:
        ValueError: no gates, not calibrated, or a target outside the calibrated range.
    """
    found = gates(model)
    if not found:
        raise _checks.no_gates("set_budget_")
    if target is None:
        return _set_threshold(model, 0.0)
    if _checks.fraction("target", target) == 1.0:
        return _set_threshold(model, -math.inf)
    thresholds = {name: threshold_for(gate.budget_table, target) for name, gate in found.items()}
    for name, gate in found.items():
        gate.threshold.fill_(thresholds[name])
    return next(iter(thresholds.values()))


def threshold_for(table: Tensor, target: float | None) -> float:
    """The threshold at which a gate with this budget table meets a target (see `set_budget_`).

    Raises:
        ValueError: not calibrated, or a target outside the calibrated range.
    """
    if target is None:
        return 0.0
    target = _checks.fraction("target", target)
    if target == 1.0:
        return -math.inf
    if len(table) == 0:
        raise ValueError(
            "this network is not calibrated yet; call dc.calibrate_(model, loader, targets=...) first"
        )
    table = table.double()
    low, high = float(table[0, 0]), float(table[-1, 0])
    if not low - 1e-6 <= target <= high + 1e-6:
        raise ValueError(
            f"a budget of {target:g} lies outside the calibrated range {low:.3f}..{high:.3f}; "
            "calibrate with that target"
        )
    return _interpolate(table, target)


def calibrated_targets(model: nn.Module) -> list[float]:
    """The targets that the network was calibrated for, ascending (empty when it was not)."""
    gate = next(iter(gates(model).values()), None)
    if gate is None:
        return []
    return [round(float(row[0]), 6) for row in gate.budget_table if row[2] > 0]


def calibrated_densities(model: nn.Module) -> dict[str, float] | None:
    """Block -> open share of its mask on the calibration images, at the thresholds that are set.

    None where the network was not calibrated (or by a version that did not keep densities), or where a threshold lies
    outside the calibrated range.
    """
    shares = {
        name: _density_at(gate.budget_table, float(gate.threshold)) for name, gate in gates(model).items()
    }
    found = {name: share for name, share in shares.items() if share is not None}
    return found if found and len(found) == len(shares) else None


def _density_at(table: Tensor, threshold: float) -> float | None:
    if threshold == -math.inf:
        return 1.0
    if len(table) == 0 or table.shape[1] < 4:
        return None
    # Shares and densities ascend, thresholds descend.
    points = sorted((float(row[1]), float(row[3])) for row in table)
    if not points[0][0] - 1e-6 <= threshold <= points[-1][0] + 1e-6:
        return None
    return float(np.interp(threshold, *zip(*points, strict=True)))


class _Meter:
    """Measures the executed share at a threshold, remembering every measured point."""

    def __init__(
        self,
        model: nn.Module,
        loader: Iterable[Any],
        max_batches: int | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.model, self.loader, self.max_batches, self.progress = model, loader, max_batches, progress
        self.points: dict[float, float] = {}
        self.densities: dict[float, dict[str, float]] = {}
        self.passes = 0
        self.images = 0

    def __call__(self, threshold: float) -> float:
        if threshold not in self.points:
            _set_threshold(self.model, threshold)
            self.points[threshold] = self._measure(threshold)
            self.passes += 1
            if self.progress is not None:
                self.progress(
                    f"pass {self.passes}: threshold {threshold:+.3f}, ratio {self.points[threshold]:.4f}"
                )
        return self.points[threshold]

    @torch.no_grad()
    def _measure(self, threshold: float) -> float:
        device = next(self.model.parameters()).device
        executed = dense = 0.0
        images, opened = 0, dict.fromkeys(gates(self.model), 0.0)
        for i, batch in enumerate(self.loader):
            if self.max_batches is not None and i >= self.max_batches:
                break
            x: Tensor = batch[0] if isinstance(batch, (tuple, list)) else batch
            with collect_masks(self.model) as masks:
                answers = self.model(x.to(device))
            _checks.finite_answers(answers, "calibrate_")
            for cost in masks.costs().values():
                executed += float(cost.executed_macs.sum())
                dense += cost.dense_macs * len(x)
            for name, mask in masks.items():
                opened[name] += float(mask.densities.sum())
            images += len(x)
        if images < 2:
            raise _checks.too_few_to_calibrate(images)
        self.images = images
        self.densities[threshold] = {name: total / images for name, total in opened.items()}
        return executed / dense


def _solve(meter: _Meter, target: float, tolerance: float) -> dict[str, float]:
    """Bracketed secant on logit(ratio) against the threshold; falls back to bisection when it stalls."""
    if target == 1.0:
        return {
            "target": 1.0,
            "threshold": -BRACKET,
            "ratio": meter(-BRACKET),
            "error": meter(-BRACKET) - 1.0,
        }
    meter(0.0)
    for step in range(MAX_PASSES):
        best = min(meter.points, key=lambda t: abs(meter.points[t] - target))
        if abs(meter.points[best] - target) <= tolerance:
            break
        candidate = _next_threshold(meter.points, target, bisect=step % 4 == 3)
        if candidate in meter.points:
            break
        meter(candidate)
    best = min(meter.points, key=lambda t: abs(meter.points[t] - target))
    ratio = meter.points[best]
    return {"target": target, "threshold": best, "ratio": ratio, "error": ratio - target}


def _fill_gaps(meter: _Meter, low: float, high: float, spacing: float) -> None:
    """Measure between neighbouring thresholds whose shares lie far apart, where they are between low and high."""
    for _ in range(MAX_PASSES * 2):
        known = sorted(meter.points.items(), key=lambda point: -point[0])
        gaps = [
            (b[1] - a[1], a[0], b[0])
            for a, b in itertools.pairwise(known)
            if b[1] > low and a[1] < high and a[0] - b[0] > 1e-3
        ]
        widest, above, below = max(gaps, default=(0.0, 0.0, 0.0))
        if widest <= spacing:
            return
        meter((above + below) / 2)


def _next_threshold(points: dict[float, float], target: float, bisect: bool) -> float:
    below = max((t for t, r in points.items() if r >= target), default=None)
    above = min((t for t, r in points.items() if r < target and (below is None or t > below)), default=None)
    if below is None:
        lowest = min(points)
        return max(-BRACKET, lowest - max(1.0, abs(lowest)))
    if above is None:
        highest = max(points)
        return min(BRACKET, highest + max(1.0, abs(highest)))
    a, b = _logit(points[below]), _logit(points[above])
    share = 0.5 if bisect or a - b < 1e-9 else (a - _logit(target)) / (a - b)
    return below + min(max(share, 0.02), 0.98) * (above - below)


def _logit(ratio: float) -> float:
    ratio = min(max(ratio, 1e-6), 1 - 1e-6)
    return math.log(ratio / (1 - ratio))


def _store(model: nn.Module, meter: _Meter, rows: Sequence[dict[str, float]]) -> None:
    """Table [K, 4] = (share, threshold, 1 for a requested target, open share of the gate's own mask).

    Shares ascend, thresholds descend.
    """
    points = meter.points
    requested = {r["threshold"]: r["target"] for r in rows if r["target"] < 1.0}
    lowest, highest = min(r["target"] for r in rows), max(r["target"] for r in rows)
    table: list[tuple[float, float, float]] = []
    for threshold in sorted({*points, *requested}, reverse=True):
        share = requested.get(threshold, points[threshold])
        inside = lowest <= share <= highest
        rising = not table or (share > table[-1][0])
        if threshold in requested or (
            inside and rising and all(abs(share - t) > 1e-4 for t in requested.values())
        ):
            table.append((share, threshold, float(threshold in requested)))
    table.sort()
    for name, gate in gates(model).items():
        own = [(*row, meter.densities[row[1]][name]) for row in table]
        gate.budget_table = gate.threshold.new_tensor(own).reshape(-1, 4)


def _interpolate(table: Tensor, target: float) -> float:
    shares, thresholds = table[:, 0].tolist(), table[:, 1].tolist()
    for i in range(len(shares)):
        if abs(shares[i] - target) < 1e-6:
            return thresholds[i]
        if shares[i] > target:
            a, b, goal = _logit(shares[i - 1]), _logit(shares[i]), _logit(target)
            return thresholds[i - 1] + (goal - a) / (b - a) * (thresholds[i] - thresholds[i - 1])
    return thresholds[-1]


def _set_threshold(model: nn.Module, threshold: float) -> float:
    for gate in gates(model).values():
        gate.threshold.fill_(threshold)
    return threshold
