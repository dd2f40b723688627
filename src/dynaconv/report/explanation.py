"""A user's own pictures: what the network said, where it computed, one page and one overlay PNG per picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dynaconv._files import atomic_write_bytes, atomic_write_text
from dynaconv.report import figures, wording
from dynaconv.report.gallery import Gallery, load_gallery
from dynaconv.report.page import render


def write_explanation(
    gallery_path: str | Path,
    out_path: str | Path,
    *,
    title: str = "Where the network computed",
    machine: str | None = None,
    classes: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the gallery page for a gallery.npz, and beside it one overlay PNG per picture.

    The PNGs are called ``STEM-01-PICTURE.png`` after ``out_path`` and the picture's own name; each shows the
    picture, the computation map and the densest and sparsest block at the lowest budget.

    Args:
        gallery_path: a gallery.npz; labels of -1 mean that the right answer is unknown.
        out_path: the HTML file to write.
        title: heading of the page.
        machine: machine line, shown where given.
        classes: class names; without them the gallery's own ``classes`` array, else ``class 3``.
        notes: sentences for the end of the page, for example skipped files.

    Returns:
        ``out_path`` as a Path.

    Raises:
        FileNotFoundError: no gallery there.
        ValueError: the gallery is unreadable or its arrays disagree.
    """
    gallery = load_gallery(gallery_path, classes=tuple(str(name) for name in classes))
    out_path = Path(out_path)
    page = render(
        "explanation.html.j2",
        charts={},
        gallery=gallery,
        title=title,
        machine=machine or "",
        lead=lead(gallery),
        notes=list(notes),
    )
    pictures = {overlay_name(out_path, gallery, k): figures.overlay(gallery, k) for k in range(len(gallery))}
    for name, png in pictures.items():
        atomic_write_bytes(out_path.parent / name, png)
    atomic_write_text(out_path, page)
    return out_path


def overlay_name(out_path: Path, gallery: Gallery, index: int) -> str:
    """File name of one picture's overlay, safe on every file system."""
    own = Path(gallery.names[index]).stem if gallery.names else "picture"
    safe = re.sub(r"[^A-Za-z0-9._-]+", "_", own).strip("._")[:60] or "picture"
    return f"{out_path.stem}-{index + 1:02d}-{safe}.png"


def lead(gallery: Gallery) -> str:
    """One sentence per picture for a few, a count for many."""
    if not len(gallery):
        return "No picture was given."
    if len(gallery) > 3:
        return f"{len(gallery)} pictures at {len(gallery.targets)} budgets."
    said = []
    for k in range(len(gallery)):
        name = gallery.names[k] if gallery.names else f"Picture {k + 1}"
        if gallery.points is not None:
            said.append(f"{name}: {gallery.points.shape[2]} keypoints.")
            continue
        sure = wording.percent(float(gallery.confidence[0, k]), 0)
        said.append(f"{name}: {gallery.class_name(int(gallery.predictions[0, k]))}, {sure} sure.")
    return " ".join(said)
