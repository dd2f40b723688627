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
