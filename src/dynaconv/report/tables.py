"""The table of all numbers, as strings ready for a template."""

from __future__ import annotations

from dataclasses import dataclass

from dynaconv.report import wording
from dynaconv.report.results import Dense, Point


@dataclass(frozen=True)
class Column:
    """A heading, its unit and what it means (shown on hover)."""

    name: str
    unit: str = ""
    help: str = ""


def columns(batches: tuple[int, ...], boxes: bool) -> list[Column]:
    """Columns of the table of all numbers."""
    timed = []
    for batch in batches:
        what = "one image" if batch == 1 else f"{batch} images"
        timed.append(Column(f"Time, {what}", "ms", "median wall-clock time of one forward pass of the batch"))
        timed.append(Column("against dense", "×", "measured time, dynamic / dense"))
    inside = [
        Column("In the box", "density", "share of the conditional MACs executed inside the object's box"),
        Column("Outside", "density", "share of the conditional MACs executed outside the object's box"),
        Column("In / out", "×", "density inside divided by density outside"),
    ]
    return [
        Column("Budget", "", "share of the conditional MACs allowed"),
        Column("Kept, held-out", "", "share of the conditional MACs executed on test images"),
        Column("Accuracy", "%", "share of test images answered rightly"),
        Column("Executed", "MMac per image", "multiply-adds done per image, gates included"),
        Column("against dense", "×", "executed MACs of the whole network / dense MACs"),
        *timed,
        *(inside if boxes else []),
    ]


def dense_cells(dense: Dense, batches: tuple[int, ...], boxes: bool) -> list[str]:
    """The dense network's row."""
    cells = ["dense", wording.MISSING, wording.percent(dense.accuracy).replace(f"{wording.THIN}%", "")]
    cells += [wording.mmac(dense.macs, unit=False), "1.00"]
    for batch in batches:
        latency = dense.latency.get(batch)
        cells += [
            wording.milliseconds(latency.ms, unit=False) if latency else wording.MISSING,
            "1.00" if latency else wording.MISSING,
        ]
    return cells + [wording.MISSING] * (3 if boxes else 0)


def point_cells(point: Point, batches: tuple[int, ...], boxes: bool) -> list[str]:
    """One budget's row."""
    cells = [f"{point.target:g}", wording.ratio(point.ratio, 3)]
    cells += [
        wording.percent(point.accuracy).replace(f"{wording.THIN}%", ""),
        wording.mmac(point.executed_macs, unit=False),
    ]
    cells.append(wording.ratio(point.macs_ratio))
    for batch in batches:
        latency = point.latency.get(batch)
        cells.append(wording.milliseconds(latency.ms, unit=False) if latency else wording.MISSING)
        cells.append(wording.ratio(latency.ratio) if latency else wording.MISSING)
    if boxes:
        cells += [
            wording.ratio(value) for value in (point.density_inside, point.density_outside, point.focus)
        ]
    return cells
