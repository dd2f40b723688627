"""Reading pictures: resize the shorter side, crop the centre, uint8 RGB."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynaconv.data.dataset import Triple, normalise

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")


def decode(path: str | Path, image_size: int) -> np.ndarray:
    """One picture, upright, as uint8 [image_size, image_size, 3].

    Raises:
        OSError: the file cannot be read as a picture.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            # Cameras store which way is up instead of turning the pixels.
            picture = ImageOps.exif_transpose(picture).convert("RGB")
            width, height = picture.size
            if (width, height) != (image_size, image_size):
                short = min(width, height)
                size = (round(width * image_size / short), round(height * image_size / short))
                picture = picture.resize(size, Image.Resampling.BILINEAR)
                left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
                picture = picture.crop((left, top, left + image_size, top + image_size))
            return np.asarray(picture, dtype=np.uint8).copy()
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"not a readable picture ({error})") from None


def picture_size(path: str | Path) -> tuple[int, int]:
    """(width, height) from the file's header.

    Raises:
        OSError: the file is no picture.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as picture:
            return picture.size
    except (UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise OSError(f"not a readable picture ({error})") from None


def load_image(path: str | Path, image_size: int, mean: Triple, std: Triple) -> tuple[Tensor, np.ndarray]:
    """A user's own picture, ready for a network.

    Returns:
        (normalised float32 [1, 3, image_size, image_size], uint8 [image_size, image_size, 3]).
    Raises:
        FileNotFoundError: there is no such file. ValueError: it is not a readable picture.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"there is no picture {file}; give the path of a JPEG or PNG file")
    try:
        pixels = decode(file, image_size)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error}; give a JPEG or PNG file") from None
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return normalise(batch, tuple(mean), tuple(std)), pixels
