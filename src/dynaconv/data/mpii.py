"""People with keypoints, annotated as MPII Human Pose is: one person a picture, cut out around the body.

Two forms of the annotations are read (the set's own is a Matlab file, from which both are made):

* DIR/annot/train.json and valid.json: {"image", "center", "scale", "joints" [K][2], "joints_vis" [K]};
* DIR/mpii_annotations.json: {"img_paths", "objpos", "scale_provided", "joint_self" [K][3], "isValidation"}.

Pictures are in DIR/images. `scale` is the body's height in units of 200 pixels.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dynaconv.data.bundle import DataBundle, subset_indices
from dynaconv.data.dataset import ImageSet, normalise
from dynaconv.data.keypoints import inside
from dynaconv.data.tasks import Keypoints

JOINTS = [
    "right ankle", "right knee", "right hip", "left hip", "left knee", "left ankle", "pelvis", "thorax", "upper neck",
    "head top", "right wrist", "right elbow", "right shoulder", "left shoulder", "left elbow", "left wrist",
]  # fmt: skip
_MIRROR = [5, 4, 3, 2, 1, 0, 6, 7, 8, 9, 15, 14, 13, 12, 11, 10]
_NECK, _HEAD = 8, 9
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# The person's box: 200 pixels a unit of scale, a quarter wider, its centre a little below the annotated one.
_BOX, _ROOM, _LOWER = 200.0, 1.25, 15.0
_TURN, _ZOOM = 30.0, 0.25


@dataclass(frozen=True)
class People:
    """Annotations: files, centres [N, 2] and side [N] of the boxes in pixels, joints [N, K, 2], known [N, K]."""

    paths: list[Path]
    centres: np.ndarray
    sides: np.ndarray
    joints: np.ndarray
    known: np.ndarray

    def subset(self, indices: Sequence[int]) -> People:
        """Some of the people."""
        rows = np.asarray(indices, dtype=np.int64)
        arrays = (self.centres, self.sides, self.joints, self.known)
        return People([self.paths[i] for i in rows], *(a[rows] for a in arrays))


class PeopleImages(ImageSet):
    """One person a picture with joints as keypoints [N, 16, 4]; errors are measured in lengths of the head.

    Augmentation flips, turns by up to 30 degrees and scales by up to a quarter, as a function of (seed, epoch, index).

    Args:
        people: annotations. image_size: side of the cut-out in pixels.
    """

    def __init__(self, people: People, image_size: int, *, augment: bool = False, seed: int = 0) -> None:
        super().__init__(torch.zeros(len(people.paths), dtype=torch.int64), MEAN, STD)
        self.people, self.image_size, self.augment, self.seed, self.epoch = (
            people,
            image_size,
            augment,
            seed,
            0,
        )
        self.task = Keypoints(alpha=0.5, length="h")

    def set_epoch(self, epoch: int) -> None:
        """Which epoch's augmentation to apply."""
        self.epoch = epoch

    def images_uint8(self, indices: Sequence[int]) -> Tensor:
        """Cut-outs, uint8 [B, 3, H, W]."""
        return torch.stack([self._cut(int(i))[0] for i in indices])

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] float32 channels-last, keypoints [B, 16, 4]."""
        cuts = [self._cut(int(i)) for i in indices]
        images = torch.stack([image for image, _ in cuts])
        return normalise(images, self.mean, self.std), torch.stack([joints for _, joints in cuts])

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def _cut(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        people, size = self.people, self.image_size
        turn, zoom, flip = self._draw(index)
        matrix = _to_picture(people.centres[index], people.sides[index] * zoom, turn, flip, size)
        try:
            with Image.open(people.paths[index]) as picture:
                coefficients = tuple(matrix.reshape(-1).tolist())
                # Pixels have their centre at 0 here and at 0.5 in PIL.
                shifted = _half_pixels(coefficients)
                cut = picture.convert("RGB").transform(
                    (size, size), Image.Transform.AFFINE, shifted, Image.Resampling.BILINEAR
                )
        except OSError as error:
            raise ValueError(
                f"{people.paths[index]} cannot be read: {error}; remove its annotation"
            ) from None
        pixels = torch.from_numpy(np.asarray(cut, dtype=np.uint8).copy()).permute(2, 0, 1)
        return pixels, self._labels(index, matrix, flip)

    def _draw(self, index: int) -> tuple[float, float, bool]:
        if not self.augment:
            return 0.0, 1.0, False
        generator = np.random.Generator(np.random.PCG64([self.seed, self.epoch, index]))
        turn = float(np.clip(generator.normal(), -2, 2)) * _TURN / 2 if generator.random() < 0.6 else 0.0
        zoom = 1 + float(np.clip(generator.normal(), -1, 1)) * _ZOOM
        return np.deg2rad(turn), zoom, bool(generator.random() < 0.5)

    def _labels(self, index: int, matrix: np.ndarray, flip: bool) -> Tensor:
        joints, known = self.people.joints[index], self.people.known[index]
        if flip:
            joints, known = joints[_MIRROR], known[_MIRROR]
        inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
        points = torch.from_numpy(joints @ inverse[:, :2].T + inverse[:, 2])
        visible = torch.from_numpy(known.astype(np.float64)) * inside(points, self.image_size)
        head = float((points[_HEAD] - points[_NECK]).norm())
        if not (known[_HEAD] and known[_NECK]) or head < 1:
            # A head is about an eighth of a body, and the box holds the body with a quarter to spare.
            head = self.image_size / _ROOM / 8
        length = torch.full((len(points), 1), head)
        return torch.cat((points, visible[:, None], length), 1).float()


def _to_picture(centre: np.ndarray, side: float, turn: float, flip: bool, size: int) -> np.ndarray:
    """The affine map [2, 3] from pixels of the cut-out to pixels of the picture."""
    cos, sin, step = np.cos(turn), np.sin(turn), side / size
    linear = step * np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if flip else 1.0, 1.0])
    middle = np.full(2, (size - 1) / 2)
    return np.concatenate([linear, (centre - linear @ middle)[:, None]], 1)


def _half_pixels(matrix: tuple[float, ...]) -> tuple[float, ...]:
    a, b, c, d, e, f = matrix
    return a, b, c + 0.5 - 0.5 * (a + b), d, e, f + 0.5 - 0.5 * (d + e)


def load_mpii(
    root: Path,
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    augment: bool = True,
) -> DataBundle:
    """People of `root`; the validation part tests, a seeded tenth of the training part calibrates.

    Args:
        image_size: side of the cut-outs in pixels (default 256).
        train_size: use only so many training people.
    Raises:
        FileNotFoundError: no annotations or no pictures. ValueError: annotations in another form.
    """
    train, test = read_annotations(root)
    order = np.random.Generator(np.random.PCG64([seed, 7])).permutation(len(train.paths))
    held = np.sort(order[: max(1, len(order) // 10)])
    rest = np.sort(order[len(held) :])
    chosen = rest[subset_indices(len(rest), train_size, seed).numpy()]
    size = 256 if image_size is None else image_size
    parts = {
        "train": PeopleImages(train.subset(chosen), size, augment=augment, seed=seed),
        "calibration": PeopleImages(train.subset(held), size),
        "test": PeopleImages(test, size),
    }
    return DataBundle(f"mpii:{root}", list(JOINTS), size, MEAN, STD, **parts)


def read_annotations(root: str | Path) -> tuple[People, People]:
    """Training and validation part of the annotations in `root`, in either form.

    Raises:
        FileNotFoundError: neither form is there, or a picture is missing. ValueError: a broken or foreign file.
    """
    root = Path(root)
    whole, parts = root / "mpii_annotations.json", [root / "annot" / f"{n}.json" for n in ("train", "valid")]
    if whole.is_file():
        rows = _rows(whole)
        groups = [[r for r in rows if bool(r.get("isValidation")) == valid] for valid in (False, True)]
        return _people(root, groups[0], whole), _people(root, groups[1], whole)
    if all(part.is_file() for part in parts):
        return _people(root, _rows(parts[0]), parts[0]), _people(root, _rows(parts[1]), parts[1])
    raise FileNotFoundError(
        f"{root} has neither mpii_annotations.json nor annot/train.json and annot/valid.json; "
        "put the annotations there and the pictures into images/"
    )


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no JSON file: {error}") from None
    rows = rows.get("root", rows) if isinstance(rows, dict) else rows
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise ValueError(f"{path} must hold a list of people, got {type(rows).__name__}")
    return rows


def _people(root: Path, rows: list[dict[str, Any]], source: Path) -> People:
    if not rows:
        raise ValueError(f"{source} has nobody for one of the parts; both training and validation are needed")
    paths, centres, sides, joints, known = [], [], [], [], []
    for i, row in enumerate(rows):
        try:
            name, centre, scale, points, visible = _person(row)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{source}: person {i} is not in a form that is known ({error!r})") from None
        paths.append(root / "images" / name)
        # Shares of pixels: Matlab counts from 1.
        centres.append(centre + np.array([0.0, _LOWER * scale]) - 1)
        sides.append(_BOX * scale * _ROOM)
        joints.append(points - 1)
        known.append(visible)
    missing = next((p for p in paths if not p.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{source} names {missing}, which is not there")
    return People(paths, *(np.stack(a) for a in (centres, sides, joints, known)))


def _person(row: dict[str, Any]) -> tuple[str, np.ndarray, float, np.ndarray, np.ndarray]:
    """File name, centre [2], scale, joints [16, 2], known [16] of one annotation, counted from 1."""
    if "joint_self" in row:
        joints = np.asarray(row["joint_self"], dtype=np.float64)
        name, centre, scale = row["img_paths"], row["objpos"], row["scale_provided"]
        points, marked = joints[:, :2], joints[:, 2]
    else:
        name, centre, scale = row["image"], row["center"], row["scale"]
        points = np.asarray(row["joints"], dtype=np.float64)
        marked = np.asarray(row["joints_vis"], dtype=np.float64).reshape(-1)
    if points.shape != (len(JOINTS), 2) or marked.shape != (len(JOINTS),) or float(scale) <= 0:
        raise ValueError(
            f"expected {len(JOINTS)} joints and a positive scale, got {list(points.shape)}, {scale}"
        )
    # What is not marked lies at the origin in one form; in the other the third number says whether it is visible.
    known = (points > 0).all(1) if "joint_self" in row else marked > 0
    return str(name), np.asarray(centre, dtype=np.float64), float(scale), points, known
