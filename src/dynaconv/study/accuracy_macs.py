"""Accuracy against executed multiply-adds, and against milliseconds, of static and dynamic networks."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynaconv.study.budget_runs import Runs, Tell
from dynaconv.study.compactness import check_settings, in_minutes
from dynaconv.study.curve_cells import Cell, Group, check_methods, grid, train
from dynaconv.study.curve_settings import Axes, CurveSettings
from dynaconv.study.folder import StudyFolder, read_json

STUDY = "accuracy-macs"
NEEDED = ("method", "budget", "width", "seed", "image_size", "asked_size", "object_share", "dense_macs")


@dataclass(frozen=True)
class Timing:
    """How to measure milliseconds: batch sizes in pictures, rounds, a limit for each batch size, engines, threads."""

    batches: Sequence[int] = (1, 32)
    rounds: int = 15
    seconds: float | None = 20.0
    engines: Sequence[str] | None = None
    threads: int | None = None


def accuracy_macs(
    settings: CurveSettings,
    axes: Axes,
    out: str | Path,
    *,
    timing: Timing | None = None,
    load: Callable[[CurveSettings], Any] | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train what is missing, compare at equal executed multiply-adds, and measure milliseconds.

    Args:
        axes: which networks; those of earlier calls are shown as well.
        out: a new folder, or one of the same study: finished networks stay, an interrupted one goes on.
        timing: None keeps the milliseconds of an earlier call, if there are any.
        load: settings at one size -> the pictures; left out, `load_dataset`.
    Returns:
        {"study", "settings", "machine", "rows" (one a training, see `curve_cells.train`), "points" (one for all seeds,
        see `curve_points.summarise`), "times"}; also written to `out` as accuracy-macs.json, rows.csv,
        accuracy-macs.csv and figures.
    Raises:
        ValueError: bad axes, a method that does not fit the network, `out` belongs to something else or was started
            with other settings; unusable data.
    """
    from dynaconv.study.curve_report import report

    tell = progress or (lambda _line: None)
    axes.check(settings)
    folder = StudyFolder(out, STUDY)
    check_settings(folder, settings)
    cells = list(grid(settings, axes))
    pictures = Pictures(settings, load or load_pictures)
    check_methods(settings, axes, pictures(cells[0].group))
    folder.claim(settings.to_dict())
    missing = [cell for cell in cells if not _file(folder, cell).is_file()]
    started = time.monotonic()
    for index, cell in enumerate(missing):
        head = f"{len(cells) - len(missing) + index + 1}/{len(cells)} {cell.group.title} {cell.name}"
        runs = Runs(folder, settings.at(cell.group.image_size, cell.group.object_share),
                    pictures(cell.group), _prefixed(tell, head), cell.group.prefix,
                    cell.easier.prefix if cell.easier else None)  # fmt: skip
        row = runs.keep(cell.name, train(runs, cell))
        left = (time.monotonic() - started) / (index + 1) * (len(missing) - index - 1)
        tell(f"{head}: {_sentence(row)}, {in_minutes(left)} left")
        last_of_seed = index + 1 == len(missing) or missing[index + 1].seed != cell.seed
        report(folder, settings, kept_rows(folder), figures=last_of_seed)
    if timing is not None:
        from dynaconv.study.curve_times import time_study

        time_study(folder, kept_rows(folder), pictures, timing, tell)
    return report(folder, settings, kept_rows(folder), figures=True)


class Pictures:
    """Data sets of the study, the last one kept in memory."""

    def __init__(self, settings: CurveSettings, load: Callable[[CurveSettings], Any]) -> None:
        self.settings, self.load = settings, load
        self.last: tuple[Group, Any] | None = None

    def __call__(self, group: Group) -> Any:
        """The data set of a group."""
        if self.last is None or self.last[0] != group:
            self.last = None
            self.last = group, self.load(self.settings.at(group.image_size, group.object_share))
        return self.last[1]


def load_pictures(settings: CurveSettings) -> Any:
    """The data set that the settings name."""
    from dynaconv.data import load_dataset

    return load_dataset(
        settings.data,
        image_size=settings.image_size,
        train_size=settings.train_size,
        augment=settings.augment,
        object_share=settings.object_share,
    )


def kept_rows(folder: StudyFolder) -> list[dict[str, Any]]:
    """Rows of all finished cells, whatever call they were for, in a readable order.

    Raises:
        ValueError: a file is damaged.
    """
    from dynaconv import _checks

    rows = []
    for file in sorted((folder.path / "cells").glob("*.json")):
        row = read_json(file)
        # The dense starts lie beside the rows.
        if "method" not in row and "ratio" in row:
            continue
        for key in NEEDED:
            if key not in row:
                raise _checks.study_damaged(file, f"it has no {key!r}")
        rows.append(row)
    return rows


def _file(folder: StudyFolder, cell: Cell) -> Path:
    return folder.path / "cells" / f"{cell.group.prefix}{cell.name}.json"


def _prefixed(tell: Tell, head: str) -> Tell:
    return lambda line: tell(f"{head}: {line}")


def _sentence(row: dict[str, Any]) -> str:
    reason = row.get("diverged") or row.get("unreachable")
    if reason:
        return f"{'diverged' if 'diverged' in row else 'not reachable'} ({reason})"
    return f"accuracy {100 * row['accuracy']:.2f} % with {row['executed_macs'] / 1e6:.2f} MMac"
