"""Files of the study of accuracy against multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynaconv.study.curve_points import POINT, point_of, summarise
from dynaconv.study.curve_settings import CurveSettings
from dynaconv.study.folder import StudyFolder, read_json

TIMES = "times.json"


def report(
    folder: StudyFolder, settings: CurveSettings, rows: Sequence[dict[str, Any]], *, figures: bool
) -> dict[str, Any]:
    """Write rows.csv, accuracy-macs.csv, accuracy-macs.json and, where asked for, the figures."""
    from dynaconv.cost import machine_line
    from dynaconv.study import curve_figures

    file = folder.path / TIMES
    times = read_json(file) if file.is_file() else None
    points = summarise(rows, times and times["points"])
    order = {tuple(p[key] for key in POINT): i for i, p in enumerate(points)}
    rows = sorted(rows, key=lambda row: (order[point_of(row)], row["seed"]))
    data = {
        "study": folder.study,
        "settings": settings.to_dict(),
        "machine": machine_line(),
        "points": points,
        "rows": rows,
        "times": times,
    }
    folder.write_csv("rows.csv", _keys(rows), rows)
    folder.write_csv("accuracy-macs.csv", _keys(points), points)
    folder.write_json("accuracy-macs.json", data)
    for name, picture in curve_figures.all_figures(points, settings.data).items() if figures else ():
        folder.write_bytes(name, picture)
    return data


def _keys(rows: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))
