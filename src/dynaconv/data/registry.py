"""Data sets by name."""

from __future__ import annotations

from dynaconv import _checks
from dynaconv.data.bundle import DataBundle
from dynaconv.data.cifar10 import load_cifar10
from dynaconv.data.folders import folder_from_spec, load_folder
from dynaconv.data.food101 import load_food101
from dynaconv.data.keypoints import load_scene_keypoints
from dynaconv.data.mpii import load_mpii
from dynaconv.data.scenes import load_scenes

_KINDS = {
    "scenes": "digits on cluttered canvases with their boxes; embedded, nothing to download",
    "scenes_keypoints": "the same scenes with the corners and the centre of the box as keypoints",
    "mpii:DIR": "people with keypoints: DIR/images, and annotations in the forms that MPII Human Pose comes in",
    "imagefolder:DIR": "pictures in DIR/train/CLASS and DIR/test/CLASS, or in DIR/CLASS",
    "food101:DIR": "Food-101 as torchvision stores it, or a seeded choice of its classes",
    "cifar10:DIR": "CIFAR-10 as torchvision stores it, or as folders of pictures",
}


def list_datasets() -> dict[str, str]:
    """Name -> what it is."""
    return dict(_KINDS)


def load_dataset(
    name: str,
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    augment: bool = True,
    object_share: float | None = None,
    classes: int | None = None,
) -> DataBundle:
    """Load a data set by name: one of `list_datasets()`.

    Args:
        image_size: side of the pictures in pixels; None keeps the data set's own.
        train_size: use only so many training pictures (a seeded choice).
        strict: an unreadable picture is an error instead of being named and skipped.
        augment: shift (and flip, where that keeps the meaning) training pictures.
        object_share: of scenes: the share of the picture that the digit's box covers.
        classes: of food101:DIR and imagefolder:DIR: a seeded choice of so many classes.
    Raises:
        ValueError: an unknown name (the nearest is suggested), or unusable data. FileNotFoundError: no folder.
    """
    kind = name.partition(":")[0]
    if image_size is not None and image_size < 8:
        raise ValueError(f"image_size must be at least 8 pixels, got {image_size}")
    if object_share is not None and name != "scenes":
        raise _checks.data_no_object_share(name)
    if classes is not None and kind not in ("food101", "imagefolder"):
        raise _checks.data_no_classes(name)
    if name == "scenes":
        return load_scenes(image_size, train_size, seed, augment, object_share=object_share)
    if name == "scenes_keypoints":
        return load_scene_keypoints(image_size, train_size, seed, augment)
    if kind == "mpii":
        return load_mpii(folder_from_spec(name), image_size, train_size, seed, augment)
    if kind == "imagefolder":
        folder = folder_from_spec(name)
        return load_folder(folder, image_size, train_size, seed, strict, augment, classes=classes)
    if kind == "food101":
        return load_food101(folder_from_spec(name), image_size, train_size, seed, strict, augment, classes)
    if kind == "cifar10":
        return load_cifar10(folder_from_spec(name), image_size, train_size, seed, strict, augment)
    known = {
        "scenes": "scenes",
        "scenes_keypoints": "scenes_keypoints",
        "mpii": "mpii:DIR",
        "imagefolder": "imagefolder:DIR",
        "food101": "food101:DIR",
        "cifar10": "cifar10:DIR",
    }
    raise _checks.unknown("data set", name, [*known, *(k for k in known.values() if ":" in k)])
