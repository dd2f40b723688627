"""The contact sheet: pictures, computation maps and block masks side by side, for a README."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from dynaconv.report.gallery import RIGHT, WRONG, Gallery, ponder_colours

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, MUTED, RIGHT_COLOUR, WRONG_COLOUR = "#1a1e24", "#59626d", "#00704f", "#b3380f"
TRUE_POINT, FOUND_POINT = "#37e08b", "#ff9a3c"
DARK = np.array([16, 20, 27], dtype=np.float32)
VERDICTS = {"right": ("✓", RIGHT_COLOUR), "wrong": ("✗", WRONG_COLOUR), "unknown": ("", INK)}


def enlarge(plane: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Nearest-neighbour resize of [h, w] to ``size``, as the masks are applied."""
    rows = np.arange(size[0]) * plane.shape[0] // size[0]
    columns = np.arange(size[1]) * plane.shape[1] // size[1]
    return plane[rows][:, columns]


def masked(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture with skipped positions darkened; uint8 [H, W, 3]."""
    open_ = enlarge(mask, image.shape[:2])[..., None].astype(np.float32)
    return (image * open_ + (0.16 * image + 0.84 * DARK) * (1 - open_)).astype(np.uint8)


def heated(image: np.ndarray, ponder: np.ndarray, blocks: int) -> np.ndarray:
    """The greyed picture under its computation map on the fixed scale 0..blocks; uint8 [H, W, 3]."""
    grey = image.astype(np.float32) @ np.array([0.299, 0.587, 0.114], dtype=np.float32)
    level = np.clip(enlarge(ponder, image.shape[:2]) / max(1, blocks) * 255, 0, 255).round().astype(int)
    colours = np.array(ponder_colours(), dtype=np.float32)[level]
    return (0.26 * grey[..., None] + 0.74 * colours).clip(0, 255).astype(np.uint8)


def choose_pictures(gallery: Gallery, count: int) -> list[int]:
    """One right answer per class first, then others; the last place goes to a wrong answer where there is one."""
    verdicts = [gallery.verdict(0, k) for k in range(len(gallery))]
    wrong = [k for k, verdict in enumerate(verdicts) if verdict == WRONG]
    others = [k for k, verdict in enumerate(verdicts) if verdict != WRONG]
    seen: set[int] = set()
    first, again = [], []
    for k in others:
        label = int(gallery.labels[k])
        (again if label in seen and label >= 0 else first).append(k)
        seen.add(label)
    ordered = first + again
    kept = ordered[: count - 1] + wrong[:1] if wrong and len(ordered) >= count else ordered[:count]
    return (kept + [k for k in wrong if k not in kept])[:count]


def choose_blocks(gallery: Gallery, count: int = 3) -> list[int]:
    """``count`` blocks spread over the depth, first and last included."""
    total = len(gallery.blocks)
    return sorted({int(round(i)) for i in np.linspace(0, total - 1, min(count, total))}) if total else []


def contact_sheet(gallery: Gallery, columns: int = 7) -> Figure:
    """Rows: picture with box and answer, computation map, masks of some blocks; 9 in wide, at the lowest budget."""
    chosen, blocks = choose_pictures(gallery, columns), choose_blocks(gallery)
    rows = _rows(gallery, blocks)
    left, right, gap, foot, head, caption = 1.16, 0.12, 0.07, 0.42, 0.52, 0.24
    cell = (9.0 - left - right - gap * (columns - 1)) / columns
    tall = cell * gallery.images.shape[1] / gallery.images.shape[2]
    height = head + caption + len(rows) * tall + (len(rows) - 1) * gap + foot
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, height))
    title = f"Where the network computes at budget {gallery.targets[0]:g}"
    figure.text(0.12 / 9, 1 - 0.20 / height, title, fontsize=13, weight="bold", color=INK, va="center")
    for row, (name, detail, draw) in enumerate(rows):
        bottom = height - head - caption - (row + 1) * tall - row * gap
        figure.text(
            0.12 / 9,
            (bottom + tall / 2 + 0.07) / height,
            name,
            fontsize=9.5,
            weight="bold",
            color=INK,
            va="center",
        )
        figure.text(
            0.12 / 9, (bottom + tall / 2 - 0.11) / height, detail, fontsize=8, color=MUTED, va="center"
        )
        for place, k in enumerate(chosen):
            x = left + place * (cell + gap)
            axes = figure.add_axes((x / 9, bottom / height, cell / 9, tall / height))
            _show(axes, gallery, k, draw(k))
            if row == 0 and gallery.points is None:
                _answer(figure, gallery, k, (x + cell / 2) / 9, (bottom + tall + 0.11) / height)
    _legend(figure, gallery, left, foot, height)
    return figure


def _rows(gallery: Gallery, blocks: list[int]) -> list[tuple]:
    """(name, detail, picture index -> uint8 image) per row."""
    shown = "object's box" if gallery.boxes is not None else ""
    if gallery.points is not None:
        shown = "× found" + ("" if gallery.truth is None else ", ○ true")
    rows = [("Picture", shown, lambda k: gallery.images[k])]
    if gallery.ponder[0] is not None:
        heat = gallery.ponder[0]
        rows.append(
            ("Computation", "all blocks", lambda k: heated(gallery.images[k], heat[k], len(gallery.blocks)))
        )
    for b in blocks:
        mask = gallery.masks[0][b]
        name = f"Block {b + 1} of {len(gallery.blocks)}"
        rows.append(
            (
                name,
                f"computes {100 * mask.mean():.0f} %",
                lambda k, mask=mask: masked(gallery.images[k], mask[k]),
            )
        )
    return rows


def _show(axes, gallery: Gallery, k: int, picture: np.ndarray) -> None:
    from matplotlib.patches import Rectangle

    axes.imshow(picture, interpolation="nearest", aspect="auto")
    axes.set_axis_off()
    box = gallery.box(k)
    if box:
        corner, size = (box[0] - 0.5, box[1] - 0.5), (box[2] - box[0], box[3] - box[1])
        for colour, width in (("black", 2.2), ("white", 1.1)):
            axes.add_patch(Rectangle(corner, *size, fill=False, ec=colour, lw=width, clip_on=True))
    _show_points(axes, gallery, k)


def _show_points(axes, gallery: Gallery, k: int) -> None:
    """Rings where keypoints are, crosses where they were found at the lowest budget, a line between the two."""
    if gallery.points is None:
        return
    found = gallery.points[0][k]
    known = np.empty((0, 4)) if gallery.truth is None else gallery.truth[k][gallery.truth[k][:, 2] > 0]
    if gallery.truth is not None:
        for (x, y), truth in zip(found, gallery.truth[k], strict=True):
            if truth[2] > 0:
                axes.plot([x, truth[0]], [y, truth[1]], color="white", lw=1.2)
    for colour, width in (("black", 2.6), (TRUE_POINT, 1.3)):
        axes.plot(known[:, 0], known[:, 1], "o", ms=8, mfc="none", mec=colour, mew=width)
    for colour, width in (("black", 2.8), (FOUND_POINT, 1.5)):
        axes.plot(found[:, 0], found[:, 1], "x", ms=6, mec=colour, mew=width)
    height, width = gallery.images.shape[1:3]
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)


def _answer(figure: Figure, gallery: Gallery, k: int, x: float, y: float) -> None:
    """``✓ 7  98 %`` over a picture; a wrong answer also says what it should have been."""
    mark, colour = VERDICTS[gallery.verdict(0, k)]
    said = gallery.class_name(int(gallery.predictions[0, k]))
    said = said if len(said) <= 11 else said[:10] + "…"
    text = f"{mark} {said}".strip()
    if gallery.verdict(0, k) == WRONG:
        truth = gallery.class_name(int(gallery.labels[k]))
        text += f" (is {truth})" if len(said + truth) <= 10 else ""
    else:
        text += f"  {100 * gallery.confidence[0, k]:.0f} %"
    weight = "bold" if gallery.verdict(0, k) != RIGHT else "normal"
    figure.text(x, y, text, fontsize=9, color=colour, ha="center", va="center", weight=weight)


def _legend(figure: Figure, gallery: Gallery, left: float, foot: float, height: float) -> None:
    """Colour ramp of the computation map and what dark means."""
    y = (foot - 0.26) / height
    at = left
    if gallery.ponder[0] is not None:
        axes = figure.add_axes((at / 9, y, 1.5 / 9, 0.11 / height))
        axes.imshow(np.array(ponder_colours(), dtype=np.uint8)[None], aspect="auto")
        axes.set_axis_off()
        figure.text(
            (at - 0.07) / 9, y + 0.055 / height, "0", fontsize=8, color=MUTED, ha="right", va="center"
        )
        words = f"{len(gallery.blocks)} blocks computed here (MAC-weighted)"
        figure.text((at + 1.57) / 9, y + 0.055 / height, words, fontsize=8, color=MUTED, va="center")
    figure.text(
        1 - 0.12 / 9, y + 0.055 / height, "dark = skipped", fontsize=8, color=MUTED, ha="right", va="center"
    )


def overlay(gallery: Gallery, index: int) -> Figure:
    """One picture, its computation map and its sparsest and densest block at the lowest budget."""
    from matplotlib.figure import Figure

    image = gallery.images[index]
    panels = [(_overlay_title(gallery, index), image)]
    if gallery.ponder[0] is not None:
        panels.append(
            ("computation, all blocks", heated(image, gallery.ponder[0][index], len(gallery.blocks)))
        )
    density = [float(mask[index].mean()) for mask in gallery.masks[0]]
    for b in dict.fromkeys([int(np.argmin(density)), int(np.argmax(density))] if density else []):
        panels.append(
            (
                f"{gallery.blocks[b]}, computes {100 * density[b]:.0f} %",
                masked(image, gallery.masks[0][b][index]),
            )
        )
    height = 2.6 * image.shape[0] / image.shape[1] + 0.42
    figure = Figure(figsize=(2.7 * len(panels), height), layout="constrained")
    for axes, (title, picture) in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        _show(axes, gallery, index, picture)
        axes.set_title(title, fontsize=9, weight="normal", color=INK)
    return figure


def _overlay_title(gallery: Gallery, index: int) -> str:
    if gallery.points is not None:
        rings = "" if gallery.truth is None else ", ○ true"
        return f"× found{rings} (budget {gallery.targets[0]:g})"
    mark, _ = VERDICTS[gallery.verdict(0, index)]
    said = gallery.class_name(int(gallery.predictions[0, index]))
    sure = f"{100 * gallery.confidence[0, index]:.0f} % sure (budget {gallery.targets[0]:g})"
    return f"{mark} {said[:24]}, {sure}".strip()
