"""`food101:DIR`: Food-101 as torchvision stores it."""

from __future__ import annotations

import json
from pathlib import Path

from dynaconv import _checks
from dynaconv.data.bundle import DataBundle
from dynaconv.data.folders import Files, bundle_of_files, some_classes

NAME, SIZE = "food-101", 224


def load_food101(
    folder: str | Path,
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    augment: bool = True,
    classes: int | None = None,
) -> DataBundle:
    """Food-101 from DIR/food-101 (or DIR itself): images/CLASS/*.jpg, and the official split in meta/{train,test}.json.

    A tenth of the training pictures, at most 2,000, is held out as the calibration split.

    Args:
        image_size: pictures are resized (shorter side) and cropped to this (default 224).
        classes: a seeded choice of so many of the 101 classes; None takes all.
    Raises:
        FileNotFoundError: no Food-101 in DIR. ValueError: damaged lists, missing or (with strict) unreadable pictures.
    Source: Bossard, Guillaumin, Van Gool: "Food-101", ECCV 2014.
    """
    root = Path(folder)
    root = root / NAME if (root / NAME).is_dir() else root
    for part in ("images", "meta/train.json", "meta/test.json"):
        if not (root / part).exists():
            raise _checks.data_no_food101(folder, root / part)
    lists = {split: _list_of(root / "meta" / f"{split}.json") for split in ("train", "test")}
    names = sorted(lists["train"])
    if unknown := sorted(set(lists["test"]) - set(names)):
        raise _checks.data_damaged_list(
            root / "meta" / "test.json", f"the class {unknown[0]!r} is not in train.json"
        )
    train, test = (_files(root / "images", lists[split], names) for split in ("train", "test"))
    names, train, test = some_classes(names, train, test, wanted=classes, seed=seed)
    return bundle_of_files(
        root,
        names,
        train,
        test,
        image_size or SIZE,
        train_size,
        seed,
        strict,
        augment,
        name=f"food101:{folder}",
    )


def _list_of(path: Path) -> dict[str, list[str]]:
    """Class -> pictures of it, "CLASS/NUMBER"."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _checks.data_damaged_list(path, str(error)) from None
    if not isinstance(found, dict) or not all(isinstance(own, list) for own in found.values()):
        raise _checks.data_damaged_list(path, "it is no object of lists")
    return found


def _files(images: Path, listed: dict[str, list[str]], names: list[str]) -> Files:
    files = Files([], [])
    for label, name in enumerate(names):
        own = listed.get(name, [])
        files.paths += [images / f"{picture}.jpg" for picture in own]
        files.labels += [label] * len(own)
    return files
