"""Several runs on common axes: accuracy against MACs and milliseconds, and one table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dynaconv import _checks
from dynaconv._files import atomic_write_text
from dynaconv.report import charts, tables
from dynaconv.report.page import render
from dynaconv.report.results import Results, load_results


def write_comparison(run_dirs: Sequence[str | Path], out_path: str | Path) -> Path:
    """Write one self-contained page that compares runs.

    Args:
        run_dirs: run folders, each with a results.json.
        out_path: the HTML file to write.

    Returns:
        ``out_path`` as a Path.

    Raises:
        FileNotFoundError: a folder has no results.json.
        ValueError: no folder was named, or a results.json is broken or of an unknown format.
    """
    if isinstance(run_dirs, (str, Path)):
        run_dirs = [run_dirs]
    folders = [Path(folder) for folder in run_dirs]
    if not folders:
        raise _checks.report_no_runs()
    runs = [(name, load_results(folder)) for name, folder in zip(run_names(folders), folders, strict=True)]
    out_path = Path(out_path)
    atomic_write_text(out_path, comparison_page(runs))
    return out_path


def run_names(folders: Sequence[Path]) -> list[str]:
    """Folder names, with as many parents as it takes to tell them apart."""
    resolved = [folder.resolve() for folder in folders]
    for depth in range(1, 8):
        names = ["/".join(folder.parts[-depth:]) for folder in resolved]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({index + 1})" for index, name in enumerate(names)]


def comparison_page(runs: list[tuple[str, Results]]) -> str:
    """The HTML of a comparison; ``runs`` are (name, results)."""
    batches = tuple(sorted({batch for _, results in runs for batch in results.batches}))
    values = [value for _, results in runs for value in charts.accuracies(results)]
    timed = {
        str(batch): _chart(runs, charts.ms_of(batch), charts.ms_title(batch), values) for batch in batches
    }
    timed = {batch: chart for batch, chart in timed.items() if chart}
    count = len(runs)
    return render(
        "comparison.html.j2",
        charts={
            "accuracy_vs_macs": _chart(runs, charts.macs_of, "executed MMac per image, from 0", values),
            "accuracy_vs_ms": timed,
        },
        title=f"{count} runs side by side" if count > 1 else runs[0][1].title,
        lead="Each line is one run, each dot one budget of its weights, each open diamond a run's own dense network. "
        "Up is more accurate, left is cheaper.",
        version=runs[0][1].version,
        created=max(results.created for _, results in runs),
        runs=[
            {"name": name, "colour": _colour(index), "dataset": results.dataset, "machine": results.machine}
            for index, (name, results) in enumerate(runs)
        ],
        warnings=warnings(runs),
        batches=[(key, f"batch {key}") for key in timed],
        table=_table(runs, batches),
    )


def warnings(runs: list[tuple[str, Results]]) -> list[str]:
    """Why some of these numbers may not be compared."""
    found = []
    timed = [results for _, results in runs if results.batches]
    if len({results.machine for results in timed}) > 1:
        found.append(
            "these runs were timed on different machines, so compare their MACs, not their milliseconds."
        )
    if len({(results.dataset, results.sizes.get("test")) for _, results in runs}) > 1:
        found.append(
            "these runs were tested on different images, so their accuracies do not compare directly."
        )
    return found


def _colour(index: int) -> str:
    return charts.SERIES[index % len(charts.SERIES)]


def _chart(runs: list[tuple[str, Results]], cost, title: str, values: list[float]) -> dict | None:
    traces = [
        charts.series(
            results,
            cost,
            name,
            _colour(i),
            charts.SYMBOLS[i % len(charts.SYMBOLS)],
            f"{charts.escape(name)}<br>",
        )
        for i, (name, results) in enumerate(runs)
    ]
    return charts.accuracy_chart(traces, title, values, legend=True)


def _table(runs: list[tuple[str, Results]], batches: tuple[int, ...]) -> dict:
    boxes = any(point.density_inside is not None for _, results in runs for point in results.points)
    rows = []
    for name, results in runs:
        if results.dense:
            rows.append({"dense": True, "cells": [name, *tables.dense_cells(results.dense, batches, boxes)]})
        rows += [
            {"dense": False, "cells": [name, *tables.point_cells(p, batches, boxes)]} for p in results.points
        ]
    return {"columns": [tables.Column("Run"), *tables.columns(batches, boxes)], "rows": rows}
