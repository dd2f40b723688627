"""The data set that belongs to a run."""

from __future__ import annotations

import sys
from typing import Any

from dynaconv import _checks
from dynaconv.cli.networks import Opened


def run_dataset(opened: Opened, spec: str | None = None, strict: bool = False) -> Any:
    """A DataBundle without augmentation: `spec`, or what the run was trained on, at the network's picture size.

    Raises:
        ValueError: no data set is known, or it has another number of classes than the network has outputs.
    """
    from dynaconv.data import load_dataset

    options = _trained_on(opened)
    if spec is not None and spec != options.get("name"):
        options = {"name": spec, "image_size": opened.input_size[1]}
    if not options.get("name"):
        raise _checks.cli_no_data_known(opened.name)
    bundle = load_dataset(options.pop("name"), strict=strict, augment=False, **options)
    for path, reason in bundle.skipped[:5]:
        print(f"skipped {path}: {reason}", file=sys.stderr)
    check_classes(opened, bundle)
    return bundle


def check_classes(opened: Opened, bundle: Any) -> None:
    """Raise where the network and the data set do not have the same number of classes."""
    outputs = opened.metadata.get("classes") or opened.num_classes
    count = outputs if isinstance(outputs, int) else len(outputs or ())
    if count and count != len(bundle.classes):
        raise _checks.cli_other_classes(bundle.name, outputs, bundle.classes)
    if isinstance(outputs, list) and list(bundle.classes) != outputs:
        print(
            "the data set's class names differ from the network's; classes are matched by order",
            file=sys.stderr,
        )


def _trained_on(opened: Opened) -> dict[str, Any]:
    """Name, size and seed of the data set, from the run's recipe or else its metadata."""
    from dynaconv.train import load_recipe

    size = opened.metadata.get("image_size")
    if opened.folder is not None and (opened.folder / "config.yaml").is_file():
        data = load_recipe(opened.folder).data
        return {
            "name": data.name,
            "image_size": size or data.image_size,
            "train_size": data.train_size,
            "seed": data.seed,
            "object_share": data.object_share,
            "classes": data.classes,
        }
    return {"name": opened.metadata.get("dataset"), "image_size": size}
