"""Data sets and their options."""

from __future__ import annotations


def data_no_object_share(name: str) -> ValueError:
    """Error for an object share of pictures that are not drawn here."""
    return ValueError(
        f"object_share is an option of scenes, whose digits are drawn to size; {name!r} has objects of its own: "
        "leave object_share out"
    )


def data_object_share(share: float, largest: float) -> ValueError:
    """Error for a share out of range."""
    return ValueError(
        f"object_share must lie in (0, {largest:g}], got {share:g}; 0.1 means that the digit's box covers a tenth of "
        "the picture"
    )


def data_small_object(share: float, image_size: int, side: int, needed: int) -> ValueError:
    """Error for a digit that nobody can read."""
    return ValueError(
        f"an object share of {share:g} leaves a digit {side} pixels at image_size {image_size}; digits need 8: "
        f"choose image_size {needed} or more, or a larger share"
    )


def data_class_count(wanted: int, there: int) -> ValueError:
    """Error for a choice of classes that cannot be made."""
    return ValueError(
        f"classes must lie in 2..{there} for this data set, got {wanted}; leave it out to take all"
    )


def data_no_classes(name: str) -> ValueError:
    """Error for a choice of classes of a data set that has only its own."""
    return ValueError(
        f"classes is an option of food101:DIR and imagefolder:DIR; {name!r} has its own: leave classes out"
    )


def data_no_food101(folder: object, missing: object) -> FileNotFoundError:
    """Error for a folder without Food-101."""
    return FileNotFoundError(
        f"no Food-101 in {folder}: {missing} is missing; expected DIR/food-101/images/CLASS/*.jpg and "
        "DIR/food-101/meta/train.json and test.json, as torchvision.datasets.Food101(DIR, download=True) leaves them"
    )


def data_damaged_list(path: object, reason: str) -> ValueError:
    """Error for a list of pictures that cannot be read."""
    return ValueError(f"{path} is damaged ({reason}); download the data set again")
