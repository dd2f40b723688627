"""A made-up run: results and a gallery with the shapes, spreads and mistakes of a real one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

CLASSES = [str(digit) for digit in range(10)]
TARGETS = (0.3, 0.5, 0.7)
BLOCKS = ("layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1")
GRIDS = (24, 24, 12, 12, 6, 6)
DENSE_MACS = 22_500_000
SEGMENTS = {
    # Seven-segment digits: (row, column, height, width) in a 9 x 5 cell.
    "a": (0, 0, 1, 5), "b": (0, 4, 5, 1), "c": (4, 4, 5, 1), "d": (8, 0, 1, 5), "e": (4, 0, 5, 1),
    "f": (0, 0, 5, 1), "g": (4, 0, 1, 5),
}  # fmt: skip
DIGITS = ("abcdef", "bc", "abged", "abgcd", "fgbc", "afgcd", "afgcde", "abc", "abcdefg", "abcdfg")


def make_scene(rng: np.random.Generator, digit: int, size: int) -> tuple[np.ndarray, list[int]]:
    """A digit on a noisy, cluttered canvas: uint8 [size, size, 3] and its box."""
    shade = rng.uniform(40, 150, (4, 4, 3)).repeat(size // 4, 0).repeat(size // 4, 1)
    image = shade * 0.5 + 40 + rng.normal(0, 12, (size, size, 3))
    for _ in range(5):
        row, column = rng.integers(0, size - 14, 2)
        along = rng.integers(6, 14)
        stroke = (
            (slice(row, row + 2), slice(column, column + along))
            if rng.random() < 0.5
            else (slice(row, row + along), slice(column, column + 2))
        )
        image[stroke] = rng.uniform(60, 200, 3)
    scale = int(rng.integers(max(2, size // 32), max(3, size // 18) + 1))
    height, width = 9 * scale, 5 * scale
    top, left = int(rng.integers(1, size - height)), int(rng.integers(1, size - width))
    colour = rng.uniform(190, 255, 3)
    for segment in DIGITS[digit]:
        row, column, tall, wide = (scale * value for value in SEGMENTS[segment])
        image[top + row : top + row + tall, left + column : left + column + wide] = colour
    return image.clip(0, 255).astype(np.uint8), [left - 1, top - 1, left + width + 1, top + height + 1]


def interest(box: list[int], size: int, grid: int, rng: np.random.Generator) -> np.ndarray:
    """How much a block wants each position: high near the box, noisy elsewhere; [grid, grid]."""
    centre = (np.arange(grid) + 0.5) * size / grid
    ys, xs = np.meshgrid(centre, centre, indexing="ij")
    dx = np.maximum(0, np.maximum(box[0] - xs, xs - box[2])) / size
    dy = np.maximum(0, np.maximum(box[1] - ys, ys - box[3])) / size
    return -6 * np.hypot(dx, dy) + rng.normal(0, 0.55, (grid, grid))


def make_gallery(count: int = 12, size: int = 48, seed: int = 0) -> dict[str, np.ndarray]:
    """Arrays of a gallery.npz; about one answer in nine is wrong."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 10
    scenes = [make_scene(rng, int(label), size) for label in labels]
    boxes = np.array([box for _, box in scenes])
    arrays: dict[str, np.ndarray] = {
        "images": np.stack([image for image, _ in scenes]),
        "labels": labels,
        "boxes": boxes,
        "blocks": np.array(BLOCKS),
        "targets": np.array(TARGETS),
        "dense_predictions": np.where(np.arange(count) == count - 2, (labels + 3) % 10, labels),
    }
    grids = [max(1, grid * size // 96) for grid in GRIDS]
    wishes = [np.stack([interest(box, size, grid, rng) for box in boxes]) for grid in grids]
    appetite = (1.0, 0.7, 1.35, 0.8, 1.2, 0.9)
    for t, target in enumerate(TARGETS):
        ponder = np.zeros((count, grids[0], grids[0]), np.float32)
        for b, wish in enumerate(wishes):
            mask = (wish >= np.quantile(wish, max(0.02, 1 - target * appetite[b]))).astype(np.uint8)
            arrays[f"masks_{t}_{b}"] = mask
            factor = grids[0] // grids[b]
            ponder += mask.repeat(factor, 1).repeat(factor, 2)[:, : grids[0], : grids[0]]
        arrays[f"ponder_{t}"] = ponder
    wrong = np.array([(k % 9 == 5) for k in range(count)])
    answers = np.where(wrong, (labels + 1) % 10, labels)
    arrays["predictions"] = np.stack([answers, np.where(np.arange(count) == 5, labels, answers), labels])
    arrays["confidence"] = rng.uniform(0.55, 0.999, (len(TARGETS), count))
    return arrays


def latency(dense_ms: float, ratio: float | None = None) -> dict:
    scale = ratio or 1.0
    timed = {"min_ms": 0.94 * dense_ms * scale, "median_ms": dense_ms * scale}
    return timed if ratio is None else {**timed, "ratio_min": ratio, "ratio_median": ratio}


def engine_latency(dense_ms: float, ratio: float | None = None) -> dict:
    """As `latency`, with every engine: ours is the fastest dense one, eager PyTorch the slowest."""
    names = {"dynaconv": 1.0, "eager": 1.6}
    if ratio is None:
        names |= {"onnxruntime": 1.1, "openvino-f32": 1.2, "openvino": 0.6}
    engines = {name: latency(dense_ms * factor, ratio) for name, factor in names.items()}
    return {**engines["dynaconv"], "engine": "dynaconv", "engines": engines}


def with_engines(results: dict) -> dict:
    """The made-up results as files hold them since engines are told apart."""
    for network in (results["dense"], *results["points"]):
        ratios = {b: timed.get("ratio_min") for b, timed in network["latency"].items()}
        network["latency"] = {b: engine_latency(1.84 if b == "1" else 31.7, r) for b, r in ratios.items()}
    return {**results, "left_out": {"inductor": "needs a C++ compiler such as g++"}}


def make_point(target: float) -> dict:
    macs_ratio = 0.11 + 0.89 * target
    blocks = []
    for b, name in enumerate(BLOCKS):
        mean = min(0.97, target * (1.0, 0.7, 1.35, 0.8, 1.2, 0.9)[b])
        spread = {"density_mean": mean, "density_std": 0.05 + 0.06 * (b % 3)}
        blocks.append({"name": name, **spread, "dense_macs": 3_300_000, "executed_macs": 3_300_000 * mean})
    return {
        "target": target,
        "threshold": 1.2 - 2 * target,
        "calibration_ratio": target + 0.0007,
        "ratio": target + 0.004,
        "accuracy": 0.9425 + 0.036 * target,
        "executed_macs": DENSE_MACS * macs_ratio,
        "macs_ratio": macs_ratio,
        "routing_macs": 180_000.0,
        "density_inside": min(0.99, 1.9 * target),
        "density_outside": 0.9 * target,
        "latency": {"1": latency(1.84, macs_ratio + 0.17), "32": latency(31.7, macs_ratio + 0.09)},
        "blocks": blocks,
    }


def make_results() -> dict:
    """results.json of a small run on ten classes."""
    history = []
    for run, epochs in (("dense", 10), ("dynamic", 14)):
        for epoch in range(epochs):
            part = (epoch + 1) / epochs
            loss = 2.2 * (1 - part) ** 2 + 0.12 + (0.06 if run == "dynamic" else 0)
            ratio = 1 - 0.7 * min(1, 2.2 * part) if run == "dynamic" else None
            row = {"run": run, "epoch": epoch, "train_loss": loss, "val_loss": 1.08 * loss}
            history.append({**row, "val_accuracy": 0.97 - 0.8 * (1 - part) ** 2, "ratio": ratio})
    return {
        "format": 1,
        "title": "DynConv ResNet-8 on scenes",
        "created": "2025-01-02T03:04:05+00:00",
        "version": "0.1.0",
        "commit": "0123abc",
        "machine": "Example CPU @ 2.6 GHz, AVX2, 2 threads, torch 2.11.0, commit 0123abc",
        "command": "dynaconv demo --out runs/demo",
        "dataset": {
            "name": "scenes",
            "classes": CLASSES,
            "image_size": 48,
            "train": 6000,
            "calibration": 1000,
            "test": 2000,
        },
        "dense": {
            "name": "resnet8_scenes",
            "accuracy": 0.9685,
            "macs": DENSE_MACS,
            "params": 175_258,
            "train_seconds": 163.0,
            "latency": {"1": latency(1.84), "32": latency(31.7)},
        },
        "points": [make_point(target) for target in TARGETS],
        "history": history,
        "notes": ["Dense and dynamic networks were trained for the same number of images."],
    }


def write_run(
    folder: Path, results: dict | None = None, gallery: dict[str, np.ndarray] | None = None
) -> Path:
    """Write a run folder; ``results`` and ``gallery`` replace the made-up ones, an empty gallery leaves none."""
    folder.mkdir(parents=True, exist_ok=True)
    results = make_results() if results is None else results
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    gallery = make_gallery() if gallery is None else gallery
    if gallery:
        np.savez_compressed(folder / "gallery.npz", **gallery)
    return folder
