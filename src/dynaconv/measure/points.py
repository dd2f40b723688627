"""Accuracy, multiply-adds and milliseconds of one network at several budgets, beside a dense one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv.budget import set_budget_
from dynaconv.convert import gates
from dynaconv.cost import collect_masks, mac_density_map, profile
from dynaconv.data import DataBundle
from dynaconv.measure.latency import dense_latency, dense_twin, dynamic_latency
from dynaconv.measure.race import Runner, race
from dynaconv.train import evaluate

PROFILED_IMAGES = 256


def measure_points(
    model: nn.Module,
    bundle: DataBundle,
    targets: Sequence[float],
    *,
    dense: nn.Module | None = None,
    dense_name: str = "dense",
    batch_sizes: Sequence[int] = (1, 32),
    rounds: int = 25,
    seconds: float | None = None,
    rivals: Sequence[str] | None = None,
    latency: bool = True,
    batch_size: int = 64,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The "dense", "points" and "left_out" parts of results.json, measured on the test split.

    Args:
        model: calibrated for `targets`; left at the lowest of them.
        dense: the baseline to compare with, in accuracy and time; by default the network without its gates (timed
            only: weights trained with masks are not meant to run without them, so it gets no accuracy).
        batch_sizes: for the timing; pictures of the test split.
        rounds, seconds: of the interleaved timing, for each batch size (see `compare_latency`).
        rivals: dense engines beside ours, see `dynaconv.measure.rivals`; None takes those that start quickly.
        latency: time at all.
        progress: called with one line before every stage.
    """
    tell = progress or (lambda _line: None)
    targets = sorted(targets)
    points = []
    for target in targets:
        tell(f"accuracy and MACs at {target:g}")
        threshold = set_budget_(model, target)
        points.append({"target": target, "threshold": threshold, **_point(model, bundle, batch_size)})
    rival = dense_twin(model) if dense is None else dense
    tell("accuracy of the dense network")
    base = _dense(rival, dense_name, bundle, batch_size, accuracy=dense is not None)
    for point in points:
        point["macs_ratio"] = point["executed_macs"] / base["macs"]
    left_out: dict[str, str] = {}
    if latency:
        tell("milliseconds, interleaved")
        options = {"rounds": rounds, "seconds": seconds, "rivals": rivals}
        left_out = _add_latency(base, points, rival, model, bundle, batch_sizes, options)
    if gates(model):
        set_budget_(model, targets[0])
    return {"dense": base, "points": points, "left_out": left_out}


def _dense(
    rival: nn.Module, name: str, bundle: DataBundle, batch_size: int, accuracy: bool
) -> dict[str, Any]:
    images, _ = bundle.test.__getitems__([0])
    counted = profile(rival, images)
    result = evaluate(rival, bundle.test, batch_size=batch_size) if accuracy else {"accuracy": None}
    return {
        "name": name,
        "accuracy": result["accuracy"],
        "macs": counted.dense_macs,
        "params": counted.params,
    }


@torch.inference_mode()
def _point(model: nn.Module, bundle: DataBundle, batch_size: int) -> dict[str, Any]:
    """One pass over the test split: accuracy, executed multiply-adds, densities."""
    images, _ = bundle.test.__getitems__([0])
    counted = profile(model, images)
    always = counted.dense_macs - counted.conditional_macs + float(counted.routing_macs[0])
    result = evaluate(model, bundle.test, batch_size=batch_size)
    spread = _block_spread(model, bundle, batch_size)
    inside, outside = _box_densities(model, bundle, batch_size)
    return {
        "ratio": result["ratio"],
        "accuracy": result["accuracy"],
        "executed_macs": always + result["ratio"] * counted.conditional_macs,
        "routing_macs": float(counted.routing_macs.mean()),
        "density_inside": inside,
        "density_outside": outside,
        "blocks": [{"name": n, **values} for n, values in spread.items()],
    }


def _block_spread(model: nn.Module, bundle: DataBundle, batch_size: int) -> dict[str, dict[str, float]]:
    """Mean and standard deviation over images of each block's density, and its multiply-adds."""
    densities: dict[str, list[Tensor]] = {}
    executed: dict[str, list[Tensor]] = {}
    dense: dict[str, int] = {}
    count = min(PROFILED_IMAGES * 2, len(bundle.test))
    for start in range(0, count, batch_size):
        images, _ = bundle.test.__getitems__(list(range(start, min(start + batch_size, count))))
        with collect_masks(model) as masks:
            model(images.contiguous(memory_format=torch.channels_last))
        for name, cost in masks.costs().items():
            densities.setdefault(name, []).append(masks[name].densities)
            executed.setdefault(name, []).append(cost.executed_macs)
            dense[name] = cost.dense_macs
    return {
        name: {
            "density_mean": float(torch.cat(values).mean()),
            "density_std": float(torch.cat(values).std(correction=0)),
            "dense_macs": dense[name],
            "executed_macs": float(torch.cat(executed[name]).mean()),
        }
        for name, values in densities.items()
    }


def _box_densities(
    model: nn.Module, bundle: DataBundle, batch_size: int
) -> tuple[float | None, float | None]:
    """Executed share of the conditional multiply-adds inside and outside the objects' boxes, over the test split."""
    boxes = getattr(bundle.test, "boxes", None)
    if boxes is None:
        return None, None
    sums = torch.zeros(4, dtype=torch.float64)
    size = (bundle.image_size, bundle.image_size)
    for start in range(0, len(bundle.test), batch_size):
        indices = list(range(start, min(start + batch_size, len(bundle.test))))
        images, _ = bundle.test.__getitems__(indices)
        with collect_masks(model) as masks:
            model(images.contiguous(memory_format=torch.channels_last))
        density = mac_density_map(masks, size).double()
        inside = _box_mask(boxes[indices], size)
        sums += torch.stack(
            [(density * inside).sum(), inside.sum(), (density * ~inside).sum(), (~inside).sum()]
        ).double()
    return float(sums[0] / sums[1]), float(sums[2] / sums[3])


def _box_mask(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """[K, H, W] bool: pixel lies in its image's box x0, y0, x1, y1 (end exclusive)."""
    ys = torch.arange(size[0])[None, :, None]
    xs = torch.arange(size[1])[None, None, :]
    x0, y0, x1, y1 = (boxes[:, i, None, None] for i in range(4))
    return (ys >= y0) & (ys < y1) & (xs >= x0) & (xs < x1)


def _add_latency(
    base: dict[str, Any],
    points: list[dict[str, Any]],
    rival: nn.Module,
    model: nn.Module,
    bundle: DataBundle,
    batch_sizes: Sequence[int],
    options: dict[str, Any],
) -> dict[str, str]:
    """Enter the milliseconds of every batch size; the engines that were left out, with the reason."""
    base["latency"] = {}
    runners = []
    for point in points:
        point["latency"] = {}
        set_budget_(model, point["target"])
        runners.append(Runner(f"{point['target']:g}", copy.deepcopy(model)))
    left_out: dict[str, str] = {}
    for batch in batch_sizes:
        # A dynamic network's time depends on its pictures, so small batches are timed on several.
        starts = range(0, len(bundle.test) - batch + 1, batch)
        batches = [
            bundle.test.__getitems__(list(range(s, s + batch)))[0] for s in starts[: max(1, 16 // batch)]
        ]
        if not batches:
            continue
        result = race(rival, runners, batches, **options)
        left_out |= result.left_out
        base["latency"][str(batch)] = dense_latency(result)
        for point, runner in zip(points, runners, strict=True):
            point["latency"][str(batch)] = dynamic_latency(result, runner.label)
    return left_out
