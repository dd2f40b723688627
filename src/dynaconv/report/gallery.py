"""gallery.npz: pictures with their masks, read, checked against results.json and packed for the browser."""

from __future__ import annotations

import base64
import gzip
import io
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dynaconv import _checks
from dynaconv.report.results import Results

RIGHT, WRONG, UNKNOWN = "right", "wrong", "unknown"
# What numpy lets through from a damaged archive: its own errors, zipfile's, zlib's and those of parsing a header.
UNREADABLE = (
    OSError, EOFError, ValueError, AttributeError, TypeError, NotImplementedError, SyntaxError,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


@dataclass(frozen=True)
class Gallery:
    """K pictures, B blocks, T budgets.

    images: uint8 [K, H, W, 3]; labels: int [K], -1 where unknown; boxes: int [K, 4] x0, y0, x1, y1 or None;
    predictions: int [T, K]; confidence: float [T, K], 0..1; dense_predictions: int [K] or None;
    masks[t][b]: uint8 [K, h, w] of 0 and 1; ponder[t]: float32 [K, H', W'], 0..B, or None; names: K file names or None;
    points: float [T, K, P, 2], keypoints that were found, x and y in pixels, or None; truth: float [K, P, 4], where
    they are, whether that is known, and the length that errors are measured in, or None.
    """

    images: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray | None
    blocks: tuple[str, ...]
    targets: tuple[float, ...]
    predictions: np.ndarray
    confidence: np.ndarray
    dense_predictions: np.ndarray | None
    masks: tuple[tuple[np.ndarray, ...], ...]
    ponder: tuple[np.ndarray | None, ...]
    names: tuple[str, ...] | None
    classes: tuple[str, ...]
    points: np.ndarray | None = None
    truth: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.images)

    def box(self, index: int) -> list[int] | None:
        """The object's box of one picture, or None where it is unknown or empty."""
        if self.boxes is None:
            return None
        x0, y0, x1, y1 = (int(value) for value in self.boxes[index])
        return [x0, y0, x1, y1] if x1 > x0 and y1 > y0 and x0 >= 0 and y0 >= 0 else None

    def class_name(self, label: int) -> str:
        """Name of a class, or its number."""
        return self.classes[label] if 0 <= label < len(self.classes) else f"class {label}"

    def verdict(self, target: int, index: int) -> str:
        """``"right"``, ``"wrong"`` or ``"unknown"`` for one picture at one budget (indices)."""
        if self.labels[index] < 0:
            return UNKNOWN
        return RIGHT if self.predictions[target, index] == self.labels[index] else WRONG


def load_gallery(path: str | Path, results: Results | None = None, classes: tuple[str, ...] = ()) -> Gallery:
    """Read a gallery; with ``results`` also check that it belongs to that run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unreadable, arrays missing or of disagreeing shapes, or another run's blocks or budgets.
    """
    path = Path(path)
    if not path.is_file():
        raise _checks.report_no_gallery(path)
    try:
        # From memory: numpy leaves a file open when it turns out to be damaged.
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
            arrays = {key: stored[key] for key in stored.files}
    except UNREADABLE as error:
        raise _checks.report_broken_gallery(path, error) from None
    named = tuple(str(name) for name in arrays.get("classes", ()))
    if "points" not in arrays:
        # Of keypoints, the classes of a run are the names of its points.
        named = classes or (results.classes if results else ()) or named
    gallery = _assemble(path, arrays, named)
    if results is not None:
        _check_same_run(path, gallery, results)
    return gallery


def _assemble(path: Path, arrays: dict[str, np.ndarray], classes: tuple[str, ...]) -> Gallery:
    for key in ("images", "labels", "blocks", "targets", "predictions", "confidence"):
        if key not in arrays:
            raise _checks.report_gallery_lacks(path, key)
    images = arrays["images"]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        got = f"{images.dtype} {list(images.shape)}"
        raise _checks.report_gallery_shape(path, "images", "uint8 [K, H, W, 3]", got)
    targets, blocks, count = arrays["targets"].reshape(-1), arrays["blocks"].reshape(-1), len(images)
    expected = {"labels": (count,), "boxes": (count, 4), "dense_predictions": (count,), "names": (count,)}
    for key, shape in (("points", (len(targets), count, -1, 2)), ("truth", (count, -1, 4))):
        if key in arrays:
            of = arrays[key].shape[-2] if arrays[key].ndim == len(shape) else -1
            expected[key] = tuple(of if n < 0 else n for n in shape)
    expected |= {"predictions": (len(targets), count), "confidence": (len(targets), count)}
    for key, shape in expected.items():
        if key in arrays and arrays[key].shape != shape:
            raise _checks.report_gallery_shape(path, key, list(shape), list(arrays[key].shape))
    masks = [
        tuple(
            _maps(path, arrays, f"masks_{t}_{b}", count).astype(bool).astype(np.uint8)
            for b in range(len(blocks))
        )
        for t in range(len(targets))
    ]
    ponder = [
        np.nan_to_num(_maps(path, arrays, f"ponder_{t}", count)).astype(np.float32)
        if f"ponder_{t}" in arrays
        else None
        for t in range(len(targets))
    ]
    order = np.argsort(targets, kind="stable")
    return Gallery(
        images=images,
        labels=arrays["labels"].astype(np.int64),
        boxes=arrays.get("boxes"),
        blocks=tuple(str(name) for name in blocks),
        targets=tuple(float(targets[t]) for t in order),
        predictions=arrays["predictions"].astype(np.int64)[order],
        confidence=np.clip(np.nan_to_num(arrays["confidence"].astype(np.float64)), 0, 1)[order],
        dense_predictions=arrays["dense_predictions"].astype(np.int64)
        if "dense_predictions" in arrays
        else None,
        masks=tuple(masks[t] for t in order),
        ponder=tuple(ponder[t] for t in order),
        names=tuple(str(name) for name in arrays["names"]) if "names" in arrays else None,
        classes=classes,
        points=arrays["points"].astype(np.float32)[order] if "points" in arrays else None,
        truth=arrays["truth"].astype(np.float32) if "truth" in arrays else None,
    )


def _maps(path: Path, arrays: dict[str, np.ndarray], key: str, count: int) -> np.ndarray:
    if key not in arrays:
        raise _checks.report_gallery_lacks(path, key)
    maps = arrays[key]
    if maps.ndim == 4 and maps.shape[1] == 1:
        maps = maps[:, 0]
    if maps.ndim != 3 or len(maps) != count or 0 in maps.shape[1:]:
        raise _checks.report_gallery_shape(path, key, f"[{count}, h, w]", list(maps.shape))
    return maps


def _check_same_run(path: Path, gallery: Gallery, results: Results) -> None:
    known = results.targets
    for target in gallery.targets:
        if not any(abs(target - other) < 1e-6 for other in known):
            raise _checks.report_other_run(path, f"budget {target:g}", [f"{t:g}" for t in known])
    names = {block.name for point in results.points for block in point.blocks}
    for block in gallery.blocks:
        if names and block not in names:
            raise _checks.report_other_run(path, f"block {block!r}", sorted(names))
    highest = (
        max((int(gallery.labels.max()), int(gallery.predictions.max())), default=0) if len(gallery) else 0
    )
    if results.classes and highest >= len(results.classes):
        raise _checks.report_other_run(path, f"class number {highest}", [f"{len(results.classes)} classes"])


def data_url(image: np.ndarray) -> str:
    """A uint8 [H, W, 3] picture as a JPEG data URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=90, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def compress(data: bytes) -> str:
    """gzip + base64, the same bytes for the same input; the page inflates it with DecompressionStream."""
    return base64.b64encode(gzip.compress(data, 9, mtime=0)).decode()


def ponder_colours() -> list[list[int]]:
    """256 RGB rows from little to much computation: inferno, as it grows in lightness throughout."""
    from matplotlib import colormaps

    return (colormaps["inferno"](np.linspace(0.04, 1, 256))[:, :3] * 255).round().astype(int).tolist()


def pack(gallery: Gallery) -> tuple[dict, str]:
    """(JSON-ready dict, compressed arrays) for the page; ``arrays`` holds [offset, h, w] of [K, h, w] uint8 runs."""
    runs: list[bytes] = []
    position = 0

    def add(maps: np.ndarray) -> list[int]:
        nonlocal position
        runs.append(np.ascontiguousarray(maps, dtype=np.uint8).tobytes())
        entry = [position, int(maps.shape[1]), int(maps.shape[2])]
        position += len(runs[-1])
        return entry

    scale = 255 / max(1, len(gallery.blocks))
    masks = [[add(mask) for mask in per_block] for per_block in gallery.masks]
    ponder = [None if p is None else add(np.clip(np.rint(p * scale), 0, 255)) for p in gallery.ponder]
    dense = gallery.dense_predictions
    meta = {
        "images": [data_url(image) for image in gallery.images],
        "width": int(gallery.images.shape[2]),
        "height": int(gallery.images.shape[1]),
        "labels": gallery.labels.tolist(),
        "boxes": [gallery.box(k) for k in range(len(gallery))],
        "names": gallery.names,
        "classes": gallery.classes,
        "blocks": gallery.blocks,
        "targets": gallery.targets,
        "predictions": gallery.predictions.tolist(),
        "confidence": gallery.confidence.round(4).tolist(),
        "dense": None if dense is None else dense.tolist(),
        "points": None if gallery.points is None else gallery.points.round(2).tolist(),
        "truth": None if gallery.truth is None else gallery.truth.round(2).tolist(),
        "arrays": {"masks": masks, "ponder": ponder},
        "colours": ponder_colours(),
    }
    return meta, compress(b"".join(runs))
