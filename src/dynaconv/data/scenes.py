"""`scenes`: handwritten digits at random places on cluttered canvases, with the box of the digit known.

The digits are scikit-learn's bundled ones (UCI, 8x8); each split draws from digits of its own, so that no digit of
the test split was seen in training. Every scene follows from (seed, split, index) by whole-number arithmetic and is
the same on every machine.
"""

from __future__ import annotations

import numpy as np
import torch

from dynaconv.data._scene_drawing import DigitPool, draw_scenes, words_per_scene
from dynaconv.data._scene_scale import MIXED, ObjectScale, object_scale
from dynaconv.data._scene_words import SceneWords
from dynaconv.data.augment import Augmentation
from dynaconv.data.bundle import DataBundle
from dynaconv.data.dataset import MemoryImages
from dynaconv.data.progress import track

SPLITS = ("train", "calibration", "test")
MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
SMALLEST = 24
_CHUNK = 100


def load_scenes(
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    augment: bool = True,
    calibration_size: int = 1200,
    test_size: int = 2000,
    progress: bool = True,
    object_share: float | None = None,
) -> DataBundle:
    """The embedded data set: no download, seeded, identical on every machine.

    Args:
        image_size: side of the canvas in pixels (default 96, at least 24); the digit takes 27 to 42 % of it.
        train_size: training scenes (default 6000).
        augment: shift the training scenes by up to an eighth of the canvas.
        object_share: mean share of the canvas that the digit's box covers, up to 0.3; left out, digits of mixed size
            that cover 0.076. Clutter shrinks with the digit, so that size does not tell them apart.
    Raises:
        ValueError: a canvas too small to hold a legible digit, or no scenes.
    """
    size = 96 if image_size is None else image_size
    counts = {
        "train": 6000 if train_size is None else train_size,
        "calibration": calibration_size,
        "test": test_size,
    }
    if size < SMALLEST:
        raise ValueError(f"scenes need image_size >= {SMALLEST} pixels to hold a legible digit, got {size}")
    if counts["train"] < 1:
        raise ValueError(f"train_size must be at least 1, got {counts['train']}")
    scale = object_scale(size, object_share)
    pools = _digit_pools()
    parts = {
        name: _draw(pools[name], i, counts[name], size, seed, progress, scale)
        for i, name in enumerate(SPLITS)
    }
    parts["train"].augmentation = (
        Augmentation(size // 16, flip=False, seed=seed, fill="reflect") if augment else None
    )
    # By another name than the data set, so that nothing loads other pictures for these.
    name = "scenes" if object_share is None else f"scenes of object share {object_share:g}"
    return DataBundle(name, [str(d) for d in range(10)], size, MEAN, STD, **parts)


def _digit_pools() -> dict[str, DigitPool]:
    """Disjoint source digits: of every ten digits of a class, seven train, one calibrates, two test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    pictures, labels = digits.images.astype(np.int64), digits.target
    rank = np.zeros(len(labels), dtype=np.int64)
    for label in range(10):
        rows = np.flatnonzero(labels == label)
        rank[rows] = np.arange(len(rows)) % 10
    share = {"train": rank < 7, "calibration": rank == 7, "test": rank > 7}
    return {name: _pool(pictures[chosen], labels[chosen]) for name, chosen in share.items()}


def _pool(pictures: np.ndarray, labels: np.ndarray) -> DigitPool:
    return DigitPool(pictures, tuple(np.flatnonzero(labels == label) for label in range(10)))


def _draw(
    pool: DigitPool,
    part: int,
    count: int,
    size: int,
    seed: int,
    progress: bool,
    scale: ObjectScale = MIXED,
) -> MemoryImages:
    images = torch.empty(count, 3, size, size, dtype=torch.uint8)
    labels, boxes = [], []
    starts = range(0, count, _CHUNK)
    for start in track(starts, f"drawing {SPLITS[part]} scenes", progress and count >= 2000):
        indices = range(start, min(start + _CHUNK, count))
        batch = draw_scenes(pool, SceneWords(seed, part, indices, words_per_scene(size)), size, scale)
        images[start : indices.stop] = torch.from_numpy(batch.images).permute(0, 3, 1, 2)
        labels.append(batch.labels)
        boxes.append(batch.boxes)
    return MemoryImages(
        images,
        torch.from_numpy(np.concatenate(labels)).long(),
        MEAN,
        STD,
        boxes=torch.from_numpy(np.concatenate(boxes)).long(),
    )
