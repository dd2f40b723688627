"""Pictures with keypoints, and the keypoint form of `scenes`: the corners and the centre of the digit's box."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dynaconv.data.bundle import DataBundle
from dynaconv.data.dataset import MemoryImages, normalise
from dynaconv.data.scenes import load_scenes
from dynaconv.data.tasks import Keypoints, known_points

CORNERS = ["top left", "top right", "bottom left", "bottom right", "centre"]


class KeypointImages(MemoryImages):
    """Pictures in memory with keypoints [N, K, 4] in the place of labels (see `Keypoints`).

    Args:
        task: how answers are judged; the other arguments are those of `MemoryImages`.
    """

    def __init__(self, *args, task: Keypoints, **options) -> None:
        super().__init__(*args, **options)
        self.task = task

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] float32 channels-last, keypoints [B, K, 4]; both are shifted together."""
        indices = list(indices)
        images, labels = self.images_uint8(indices), self.labels[indices]
        if self.augmentation is not None:
            images = self.augmentation(images, indices)
            labels = labels.clone()
            labels[:, :, :2] += self.augmentation.offsets(indices)[:, None]
            labels[:, :, 2] *= inside(labels[:, :, :2], images.shape[-1])
        return normalise(images, self.mean, self.std), labels

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]


def inside(points: Tensor, size: int) -> Tensor:
    """1 where a point [..., 2] lies on a picture of this side, else 0."""
    return ((points >= -0.5) & (points <= size - 0.5)).all(-1).float()


def load_scene_keypoints(
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    augment: bool = True,
    calibration_size: int = 1200,
    test_size: int = 2000,
    progress: bool = True,
) -> DataBundle:
    """The pictures of `scenes` with the corners and the centre of the digit's box as keypoints; PCK@0.2 of its side.

    Args: as `load_scenes`.
    Raises:
        ValueError: as `load_scenes`.
    """
    scenes = load_scenes(image_size, train_size, seed, augment, calibration_size, test_size, progress)
    parts = {name: _with_corners(getattr(scenes, name)) for name in ("train", "calibration", "test")}
    return replace(scenes, name="scenes_keypoints", classes=list(CORNERS), **parts)


def _with_corners(part: MemoryImages) -> KeypointImages:
    x0, y0, x1, y1 = part.boxes.double().unbind(1)
    # The end of a box is exclusive; a keypoint lies on the last pixel.
    x1, y1 = x1 - 1, y1 - 1
    corners = [(x0, y0), (x1, y0), (x0, y1), (x1, y1), ((x0 + x1) / 2, (y0 + y1) / 2)]
    xy = torch.stack([torch.stack(point, 1) for point in corners], 1)
    labels = known_points(xy, torch.maximum(x1 - x0, y1 - y0) + 1)
    return KeypointImages(
        part.images,
        labels,
        part.mean,
        part.std,
        boxes=part.boxes,
        augmentation=part.augmentation,
        task=Keypoints(),
    )
