"""A tiny Food-101: four classes of one colour each, in torchvision's layout."""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image

CLASSES = ("apple_pie", "bibimbap", "ceviche", "donuts")


def fake_food101(folder: Path, trained: int = 5) -> Path:
    """So many pictures of each class to train, two to test; returns the folder to name after food101:."""
    root = folder / "food-101"
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(CLASSES):
        (root / "images" / name).mkdir(parents=True)
        for number in range(trained + 2):
            picture = Image.new("RGB", (40 + number, 36), (60 * label, 10 * number, 90))
            picture.save(root / "images" / name / f"{number}.jpg")
        lists["train"][name] = [f"{name}/{n}" for n in range(trained)]
        lists["test"][name] = [f"{name}/{n}" for n in (trained, trained + 1)]
    (root / "meta").mkdir()
    for split, listed in lists.items():
        (root / "meta" / f"{split}.json").write_text(json.dumps(listed))
    return folder
