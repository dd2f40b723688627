"""`lowering="auto"`: which masked blocks are faster sparse, at the densities that they are going to have."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.budget.calibration import calibrated_densities
from dynaconv.convert import gates
from dynaconv.export import winograd
from dynaconv.export.branches import Branch
from dynaconv.export.channels import ChannelBranch
from dynaconv.export.parts import ComputedStage, FusedStage, Stage
from dynaconv.export.stages import lays_out_map
from dynaconv.export.tables import Grid

# Nanoseconds in ONNX Runtime of what is counted below; `benchmarks/lowering_costs.py --write` measures them.
COSTS = Path(__file__).with_name("costs.json")
# Sparse has to be expected this much faster: a block alone among dense ones also turns layouts, and batches fall out of
# caches.
MARGIN = 0.85
# And by so many nanoseconds: the small operations of a sparse block, which its amounts do not count (MobileNetV2's
# blocks of 7 x 7 gain less, and two of them made the network slower; docs/benchmarks.md).
SMALL_OPERATIONS_NS = 60e3
_SPARSE = ("sparse_product", "sparse_depthwise", "gathered", "written", "copied")


@functools.lru_cache(maxsize=1)
def measured_costs() -> dict[str, float]:
    """Name of an amount -> nanoseconds."""
    return json.loads(COSTS.read_text())["ns"]


def nanoseconds(amounts: Mapping[str, float], costs: Mapping[str, float] | None = None) -> float:
    """What these amounts cost together."""
    costs = measured_costs() if costs is None else costs
    return sum(costs.get(name, 0.0) * amount for name, amount in amounts.items())


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


def choose_sparse(branches: list[Branch], densities: Mapping[str, float], images: int) -> list[Branch]:
    """Those branches that the cost model expects to be faster sparse at their densities, image by image.

    Args:
        images: as of `rows.lower`.
    """
    chosen = []
    for branch in branches:
        sparse = nanoseconds(sparse_amounts(branch, densities.get(branch.name, 1.0), images))
        dense = nanoseconds(dense_amounts(branch))
        if sparse < MARGIN * dense - SMALL_OPERATIONS_NS:
            chosen.append(branch)
    return chosen


def dense_amounts(branch: Branch) -> dict[str, float]:
    """Of one image computed everywhere: multiply-adds, numbers that are multiplied by the mask and added, and numbers
    in the windows that convolutions with computed kernels write.
    """
    found = dict.fromkeys(("product", "depthwise", "unfolded"), 0.0)
    for stage, outside in zip(branch.stages, _positions(branch), strict=True):
        found["depthwise" if stage.depthwise else "product"] += outside * stage.weight.size
        if isinstance(stage, ComputedStage) and not stage.depthwise and not stage.pointwise:
            found["unfolded"] += outside * _window(stage)
        if isinstance(stage, FusedStage):
            found["product"] += outside * _fusion(stage)
    return found | {"masked": float(branch.channels * _positions(branch)[-1])}


def sparse_amounts(branch: Branch, density: float, images: int) -> dict[str, float]:
    """Of one image at open positions: multiply-adds, numbers that are gathered, of rows written and of maps copied.

    block: 1, the small operations, which many images share.

    Args:
        images: as of `rows.lower`.
    """
    if isinstance(branch, ChannelBranch):
        return _narrow_amounts(branch, density)
    found = dict.fromkeys(_SPARSE, 0.0)
    shares, positions = _shares(branch, density), _positions(branch)
    for i, (stage, share, outside) in enumerate(zip(branch.stages, shares, positions, strict=True)):
        rows = share * outside
        found["written"] += rows * stage.weight.shape[0]
        if isinstance(stage, FusedStage):
            found["sparse_product"] += rows * _fusion(stage)
            # Scales, and the centres where they are not the rows themselves.
            found["gathered"] += rows * (stage.weight.shape[0] + stage.inputs * (not stage.pointwise))
        if winograd.serves(stage, Grid(None, *stage.conv.outputs[0].shape[2:]), images):
            # Sixteen numbers and products for a tile of four; the transforms read both as gathers do.
            tiled = 4 * outside * _grown(share, 0.12)
            found["sparse_product"] += tiled * stage.weight[..., 0, 0].size
            found["gathered"] += tiled * (2 * stage.inputs + stage.weight.shape[0])
            continue
        found["sparse_depthwise" if stage.depthwise else "sparse_product"] += rows * stage.weight.size
        if i == 0 or not stage.pointwise:
            found["gathered"] += rows * _window(stage)
        if i > 0 and not stage.pointwise and lays_out_map(stage.inputs, stage.stride):
            found["copied"] += positions[i - 1] * stage.inputs
    found["copied"] += positions[-1] * branch.channels
    return found | {"block": 1.0}


def _narrow_amounts(branch: ChannelBranch, density: float) -> dict[str, float]:
    """Of one image that computes this share of its hidden channels; its weights are gathered, too."""
    found, last = dict.fromkeys(_SPARSE, 0.0), len(branch.stages) - 1
    for i, (stage, outside) in enumerate(zip(branch.stages, _positions(branch), strict=True)):
        inputs, outputs = density if i > 0 else 1.0, density if i < last else 1.0
        weights = stage.weight.size * (outputs if stage.groups > 1 else inputs * outputs)
        found["sparse_depthwise" if stage.depthwise else "sparse_product"] += outside * weights
        found["written"] += outside * outputs * stage.weight.shape[0]
        found["gathered"] += weights + (0 if stage.pointwise else outside * inputs * _window(stage))
    found["copied"] += _positions(branch)[-1] * branch.channels
    return found | {"block": 1.0}


def _fusion(stage: FusedStage) -> int:
    """Multiply-adds of Q, the fusion matrix and P at one position."""
    latent, inputs = stage.q.shape
    return latent * (inputs + latent + stage.weight.shape[0])


def _window(stage: Stage) -> int:
    """Numbers that one position reads."""
    return stage.inputs * int(np.prod(stage.kernel))


def _shares(branch: Branch, density: float) -> list[float]:
    """Share of the positions that each convolution computes."""
    shares = [density]
    for stage in reversed(branch.stages[1:]):
        shares.insert(0, shares[0] if stage.pointwise else _grown(shares[0], 0.6))
    return shares


def _grown(share: float, border: float) -> float:
    """What becomes of an open share where blobs grow at their borders."""
    return min(1.0, float(share + border * np.sqrt(share) * (1 - share)))


def _positions(branch: Branch) -> list[int]:
    """Positions of each convolution's output; free sizes count as 28 x 28."""
    return [_area(stage.conv.outputs[0]) for stage in branch.stages]


def _area(value: Any) -> int:
    h, w = (d if isinstance(d, int) else 28 for d in value.shape[2:])
    return h * w


__all__ = ["choose_sparse", "dense_amounts", "measure_densities", "nanoseconds", "sparse_amounts"]
