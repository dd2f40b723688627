"""`lowering="auto"`: which masked blocks are faster sparse, at the densities that they are going to have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.budget.calibration import calibrated_densities
from dynaconv.convert import gates
from dynaconv.export.branches import Branch

# Estimates, not measured on the machine that will run the file, in multiply-adds of a dense convolution that take as
# long: a multiply-add of a depthwise convolution; one gathered and multiplied number of a sparse depthwise one; one
# number gathered for a product; one written back; the small operations of a block.
DEPTHWISE, SPARSE_DEPTHWISE, GATHERED, WRITTEN, OVERHEAD = 6.0, 60.0, 12.0, 30.0, 6e6


def measure_densities(
    model: nn.Module, example: tuple[Tensor, ...], given: Mapping[str, float] | float | None
) -> dict[str, float]:
    """Block -> open share of its mask: as given, else as calibrated for the thresholds that are set, else what the
    gates decide for the example.

    Raises:
        ValueError: shares outside [0, 1], or of blocks that do not exist.
    """
    found = gates(model)
    if isinstance(given, (int, float)):
        given = dict.fromkeys(found, float(given))
    if given is not None:
        unknown = [name for name in given if name not in found]
        if unknown:
            raise _checks.export_unknown_blocks(unknown, list(found))
        for name, share in given.items():
            if not 0 <= share <= 1:
                raise ValueError(f"densities must lie in [0, 1], got {share!r} for {name}")
        return {name: float(given.get(name, 1.0)) for name in found}
    calibrated = calibrated_densities(model)
    return _decided(model, example) if calibrated is None else calibrated


@torch.no_grad()
def _decided(model: nn.Module, example: tuple[Tensor, ...]) -> dict[str, float]:
    shares: dict[str, float] = {}

    def keeper(name: str) -> Any:
        return lambda _gate, _args, mask: shares.__setitem__(name, float(mask.float().mean()))

    handles = [gate.register_forward_hook(keeper(name)) for name, gate in gates(model).items()]
    try:
        model(*example)
    finally:
        for handle in handles:
            handle.remove()
    return shares


def choose_sparse(branches: list[Branch], densities: Mapping[str, float]) -> list[Branch]:
    """Those branches that the cost model expects to be faster sparse at their densities."""
    chosen = []
    for branch in branches:
        density = densities.get(branch.name, 1.0)
        if sparse_cost(branch, density) < dense_cost(branch):
            chosen.append(branch)
    return chosen


def dense_cost(branch: Branch) -> float:
    """Of computing everywhere, for one image, in multiply-adds of a dense convolution."""
    total = 0.0
    for stage, (_, outside) in zip(branch.stages, _positions(branch), strict=True):
        total += outside * stage.weight.size * (DEPTHWISE if stage.depthwise else 1.0)
    last = branch.stages[-1].weight.shape[0] * _positions(branch)[-1][1]
    return total + WRITTEN * last


def sparse_cost(branch: Branch, density: float) -> float:
    """Of computing open positions, for one image: products, gathering, writing back."""
    total, shares = OVERHEAD, _shares(branch, density)
    for stage, share, (_, outside) in zip(branch.stages, shares, _positions(branch), strict=True):
        rows, outputs = share * outside, stage.weight.shape[0]
        taps = int(np.prod(stage.kernel)) * stage.weight.shape[1] * stage.groups
        if stage.depthwise:
            total += rows * taps * SPARSE_DEPTHWISE
        else:
            total += rows * (stage.weight.size + (0 if stage.pointwise else GATHERED * taps))
        total += WRITTEN * rows * outputs
    return total


def _shares(branch: Branch, density: float) -> list[float]:
    """Share of the positions that each convolution computes: masks of blobs grow at their borders."""
    shares = [density]
    for stage in reversed(branch.stages[1:]):
        grown = (
            shares[0] if stage.pointwise else min(1.0, shares[0] + 0.6 * np.sqrt(shares[0]) * (1 - shares[0]))
        )
        shares.insert(0, float(grown))
    return shares


def _positions(branch: Branch) -> list[tuple[int, int]]:
    """(positions of the input, positions of the output) of each convolution; free sizes count as 28 x 28."""
    found = []
    for stage in branch.stages:
        sizes = [_area(value) for value in (stage.conv.inputs[0], stage.conv.outputs[0])]
        found.append((sizes[0], sizes[1]))
    return found


def _area(value: Any) -> int:
    h, w = (d if isinstance(d, int) else 28 for d in value.shape[2:])
    return h * w


__all__ = ["choose_sparse", "dense_cost", "measure_densities", "sparse_cost"]
