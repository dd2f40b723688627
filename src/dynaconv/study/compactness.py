"""A static network against its dynamic versions at equal schedule: the grid, kept row by row."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv.study.cell import Cell, build, grid, train
from dynaconv.study.folder import StudyFolder, read_json
from dynaconv.study.methods import Method, parse_method
from dynaconv.study.settings import CompactnessSettings

STUDY = "compactness"
CELLS, RUNS = "cells", "runs"


def compactness(
    settings: CompactnessSettings,
    methods: list[Method],
    seeds: int,
    out: str | Path,
    *,
    bundle: Any = None,
    batches: tuple[int, ...] = (1, 32),
    rounds: int = 15,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every method with every seed, skipping the rows that are there already, and compare them.

    Args:
        out: a new folder, or one of the same study: finished rows stay, an interrupted one goes on.
        bundle: data instead of `load_dataset(settings.data, ...)`.
        batches: batch sizes of the timing, in pictures; none times nothing. rounds: of the interleaved timing.
    Returns:
        {"settings", "machine", "rows" (one a cell), "methods" (one a method, see `compactness_table.summarise`)}; also
        written to `out` as compactness.json, compactness.csv (methods), rows.csv (cells) and compactness.png.
    Raises:
        ValueError: `out` belongs to something else, or was started with other settings; unusable data.
    """
    from dynaconv.study.compactness_table import report

    tell = progress or (lambda _line: None)
    folder = StudyFolder(out, STUDY)
    check_settings(folder, settings)
    cells = grid(methods, seeds)
    for method in methods:
        settings.recipe(method, 0)
    shown = [*cells, *(cell for cell in kept_cells(folder) if cell not in cells)]
    rows = {cell.name: row for cell in shown if (row := read_row(folder, cell)) is not None}
    bundle = bundle if bundle is not None else load_data(settings)
    folder.claim(settings.to_dict())
    started, trained = time.monotonic(), 0
    for index, cell in enumerate(cells):
        if cell.name in rows:
            continue
        head = f"{index + 1}/{len(cells)} {cell.name}"
        row = train(settings, cell, bundle, folder.path / RUNS / cell.name, _prefixed(tell, head))
        rows[cell.name] = row
        folder.write_json(f"{CELLS}/{cell.name}.json", row)
        trained += 1
        missing = sum(other.name not in rows for other in cells)
        left = (time.monotonic() - started) / trained * missing
        tell(f"{head}: {_sentence(row)}, {in_minutes(left)} left")
        report(folder, settings, _in_order(rows, shown), {})
    compared = list(dict.fromkeys(cell.method for cell in shown))
    latency = time_networks(settings, compared, bundle, batches, rounds, tell) if batches else {}
    return report(folder, settings, _in_order(rows, shown), latency)


def kept_cells(folder: StudyFolder) -> list[Cell]:
    """Cells that earlier calls finished, whatever was asked for then."""
    found = []
    for file in sorted((folder.path / CELLS).glob("*-seed*.json")):
        name, _, seed = file.stem.rpartition("-seed")
        found.append(Cell(parse_method(name), int(seed)))
    return found


def _in_order(rows: dict[str, dict[str, Any]], cells: list[Cell]) -> list[dict[str, Any]]:
    return [rows[cell.name] for cell in cells if cell.name in rows]


def check_settings(folder: StudyFolder, settings: CompactnessSettings) -> None:
    """Refuse to mix rows of different schedules.

    Raises:
        ValueError: the folder's study was started with other settings, or belongs to something else.
    """
    there = folder.check().get("settings")
    for key, here in settings.to_dict().items() if there is not None else ():
        if there.get(key) != here:
            raise _checks.study_other_settings(folder.path, key, there.get(key), here)


def read_row(folder: StudyFolder, cell: Cell) -> dict[str, Any] | None:
    """The finished row of a cell, None where there is none.

    Raises:
        ValueError: its file is damaged.
    """
    file = folder.path / CELLS / f"{cell.name}.json"
    if not file.is_file():
        return None
    row = read_json(file)
    for key in ("method", "seed", "params", "macs"):
        if key not in row:
            raise _checks.study_damaged(file, f"it has no {key!r}")
    return row


def load_data(settings: CompactnessSettings) -> Any:
    """The pictures that all rows share, decoded once."""
    from dynaconv.data import load_dataset

    return load_dataset(
        settings.data,
        image_size=settings.image_size,
        train_size=settings.train_size,
        augment=settings.augment,
    )


def time_networks(
    settings: CompactnessSettings,
    methods: list[Method],
    bundle: Any,
    batches: tuple[int, ...],
    rounds: int,
    tell: Callable[[str], None],
) -> dict[str, dict[str, Any]]:
    """Milliseconds of each network, interleaved, on test pictures: method -> batch size -> latency.

    Weights do not change the time, so fresh networks are timed.
    """
    from dynaconv.cost import latency_of

    tell(f"milliseconds at batch {', '.join(map(str, batches))}, interleaved")
    networks = {method.name: build(settings, Cell(method, 0), bundle).eval() for method in methods}
    found: dict[str, dict[str, Any]] = {name: {} for name in networks}
    for batch in batches:
        images, _ = bundle.test.__getitems__([i % len(bundle.test) for i in range(batch)])
        for name, times in latency_of(networks, images, rounds=rounds).items():
            found[name][str(batch)] = times
    return found


def _prefixed(tell: Callable[[str], None], head: str) -> Callable[[str], None]:
    return lambda line: tell(f"{head}: {line}")


def _sentence(row: dict[str, Any]) -> str:
    if "diverged" in row:
        return f"diverged ({row['diverged']})"
    return f"accuracy {100 * row['accuracy']:.2f} % after {row['seconds']:.0f} s"


def in_minutes(seconds: float) -> str:
    """A duration for people."""
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {seconds:.0f} s"
