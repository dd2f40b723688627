"""From rows to a table: means and spreads over seeds, CSV, JSON and the figure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from dynaconv._table import format_table
from dynaconv.study.folder import StudyFolder
from dynaconv.study.methods import parse_method
from dynaconv.study.settings import CompactnessSettings

ROW = (
    *("method", "seed", "accuracy", "loss", "validation_accuracy", "train_loss", "epochs", "seconds"),
    *("params", "static_macs", "mixing_macs", "routing_macs", "macs", "diverged"),
)
COSTS = ("params", "static_macs", "mixing_macs", "routing_macs", "macs")
SUMMARY = ("method", "seeds", "accuracy_mean", "accuracy_std", "gain", *COSTS, "train_seconds")


def summarise(
    rows: Sequence[Mapping[str, Any]], latency: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """One row a method: accuracy_mean and accuracy_std (sample, None for one seed) over its seeds, gain over the static
    network with the same seeds, params, MACs of one image, and ms_B (median) and ms_B_ratio to static for each batch B.
    """
    base = {r["seed"]: r["accuracy"] for r in rows if r["method"] == "static" and "accuracy" in r}
    found = []
    for name in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == name]
        done = [row for row in own if "accuracy" in row]
        values = [row["accuracy"] for row in done]
        gains = [row["accuracy"] - base[row["seed"]] for row in done if row["seed"] in base]
        row = {
            "method": name,
            "seeds": len(done),
            "accuracy_mean": statistics.fmean(values) if values else None,
            "accuracy_std": statistics.stdev(values) if len(values) > 1 else None,
            "gain": statistics.fmean(gains) if gains else None,
            **{key: own[0][key] for key in COSTS},
            "train_seconds": statistics.fmean(r["seconds"] for r in done) if done else None,
        }
        found.append({**row, **_milliseconds(latency.get(name, {}), latency.get("static", {}))})
    return found


def _milliseconds(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for batch, times in own.items():
        found[f"ms_{batch}"] = times["median_ms"]
        if batch in base:
            found[f"ms_{batch}_ratio"] = times["median_ms"] / base[batch]["median_ms"]
    return found


def report(
    folder: StudyFolder,
    settings: CompactnessSettings,
    rows: list[dict[str, Any]],
    latency: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """Write rows.csv, compactness.csv, compactness.json and, where something was trained, compactness.png."""
    from dynaconv.cost import machine_line
    from dynaconv.study.compactness_figure import figure

    methods = summarise(rows, latency)
    extra = list(dict.fromkeys(key for row in methods for key in row if key.startswith("ms_")))
    data = {
        "study": folder.study,
        "settings": settings.to_dict(),
        "machine": machine_line(),
        "methods": methods,
        "rows": rows,
    }
    folder.write_csv("rows.csv", ROW, rows)
    folder.write_csv("compactness.csv", (*SUMMARY, *extra), methods)
    folder.write_json("compactness.json", data)
    if any(row["accuracy_mean"] is not None for row in methods):
        folder.write_bytes("compactness.png", figure(methods, settings.data.partition(":")[0]))
    return data


def table(methods: Sequence[Mapping[str, Any]]) -> str:
    """The summary for people."""
    batches = [key.removeprefix("ms_") for key in _keys(methods) if not key.endswith("_ratio")]
    header = ["method", "seeds", "accuracy", "gain", "parameters", "static MACs", "mixing", "routing"]
    header += [f"ms, batch {batch} (ratio)" for batch in batches]
    return format_table(header, [_cells(row, batches) for row in methods], "l" + "r" * (len(header) - 1))


def _keys(methods: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in methods for key in row if key.startswith("ms_")))


def _cells(row: Mapping[str, Any], batches: Sequence[str]) -> list[str]:
    mean, std, gain = row["accuracy_mean"], row["accuracy_std"], row["gain"]
    accuracy = "diverged" if mean is None else f"{100 * mean:.2f} %"
    spread = "" if std is None else f" ± {100 * std:.2f}"
    cells = [parse_method(row["method"]).title, str(row["seeds"]), accuracy + spread]
    cells += ["-" if gain is None or row["method"] == "static" else f"{100 * gain:+.2f}"]
    cells += [f"{row[key]:,}" for key in ("params", "static_macs", "mixing_macs", "routing_macs")]
    for batch in batches:
        ms, ratio = row.get(f"ms_{batch}"), row.get(f"ms_{batch}_ratio")
        cells.append("-" if ms is None else f"{ms:.2f}" + ("" if ratio is None else f" ({ratio:.2f})"))
    return cells
