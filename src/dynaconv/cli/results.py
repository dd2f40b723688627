"""results.json of a run that is evaluated again: new points beside what is known already."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

from dynaconv.cli.networks import Opened


def keep_results(opened: Opened, bundle: Any, measured: dict[str, Any], command: str) -> Path:
    """Write results.json and gallery.npz into the run.

    An earlier results.json keeps its title, notes, dense baseline and history; milliseconds that were not measured
    again stay with their budgets, and its other budgets stay as long as the network is calibrated as it was.
    """
    from dynaconv.measure import build_gallery, read_results, write_results

    folder = opened.folder
    try:
        old = read_results(folder)
    except (FileNotFoundError, ValueError):
        old = {}
    points = merge_points(old.get("points", []), measured["points"])
    dense = measured["dense"]
    if dense["accuracy"] is None:
        # The network without gates is only a stand-in for a trained baseline; its milliseconds hold.
        kept = old.get("dense") or dense
        timed = "latency" in dense and kept["macs"] == dense["macs"]
        dense = {**kept, "latency": dense["latency"]} if timed else kept
    targets = [point["target"] for point in points]
    return write_results(
        folder,
        title=old.get("title") or f"{folder.name} on {bundle.name}",
        command=old.get("command") or command,
        bundle=bundle,
        measured={"dense": dense, "points": points, "left_out": measured.get("left_out", {})},
        history=old.get("history") or history(folder),
        notes=old.get("notes", []),
        gallery=build_gallery(opened.model, bundle, targets) if targets else None,
    )


def merge_points(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """New points, sorted by target, with the milliseconds of old ones where they have none themselves.

    Old points stay where the new ones show that the calibration is the same, or say nothing about it.
    """
    before = {point["target"]: point for point in old}
    after = {point["target"]: finite(point) for point in new}
    same = all(_same_threshold(before[t], after[t]) for t in before.keys() & after.keys())
    merged = {**(before if same else {}), **after}
    for target, point in after.items():
        if target in before and same and "latency" in before[target] and "latency" not in point:
            merged[target] = {**point, "latency": before[target]["latency"]}
    return [merged[target] for target in sorted(merged)]


def _same_threshold(a: dict[str, Any], b: dict[str, Any]) -> bool:
    x, y = a.get("threshold"), b.get("threshold")
    return x == y or (x is not None and y is not None and math.isclose(x, y, rel_tol=1e-5, abs_tol=1e-6))


def finite(point: dict[str, Any]) -> dict[str, Any]:
    """The point without infinite numbers, which JSON lacks: a budget of 1 has the threshold -inf."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in point.items()
    }


def history(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    """One entry an epoch from a run's metrics.csv, empty where there is none; `name` is "dense" or "dynamic"."""
    file = folder / "metrics.csv"
    if not file.is_file():
        return []
    with open(file, encoding="utf-8", newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row.get("val_accuracy")]
    keys = {
        "train_loss": "train_loss",
        "val_loss": "val_loss",
        "val_accuracy": "val_accuracy",
        "ratio": "val_ratio",
    }
    entries = []
    for row in rows:
        values = {key: float(row[column]) if row.get(column) else None for key, column in keys.items()}
        kind = name or ("dense" if values["ratio"] is None else "dynamic")
        entries.append({"run": kind, "epoch": int(row["epoch"]), **values})
    return entries
