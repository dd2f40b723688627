"""The files of a correlation study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaconv.study.correlation import BUCKETS
from dynaconv.study.correlation_figure import figure
from dynaconv.study.folder import StudyFolder

HISTOGRAM = ("of", "network", "low", "high", "share")
SUMMARY = (
    "of",
    "network",
    "layer",
    *BUCKETS,
    "inside",
    "mean",
    "mean_abs",
    "images",
    "skipped",
    "rows",
    "dropped",
)


def write(folder: StudyFolder, found: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write correlation.json, buckets.csv, histogram.csv and correlation.png.

    Args:
        found: from `correlate`. facts: networks, data, thresholds, machine.
    Returns:
        What correlation.json holds.
    """
    data = {"study": folder.study, **facts, **found}
    summary, histogram = [], []
    for kind, layers in (("features", found["layers"]), ("kernels", found["kernel_layers"])):
        for network, layer in zip(("static", "dynamic"), layers, strict=True):
            result, where = found[kind][network], {"of": kind, "network": network}
            summary.append({**where, "layer": layer, **result["buckets"], **result})
            edges = result["edges"]
            for low, high, share in zip(edges, edges[1:], result["histogram"], strict=False):
                histogram.append({**where, "low": round(low, 6), "high": round(high, 6), "share": share})
    folder.claim({key: facts[key] for key in ("networks", "data", "thresholds")})
    folder.write_csv("buckets.csv", SUMMARY, summary)
    folder.write_csv("histogram.csv", HISTOGRAM, histogram)
    folder.write_json("correlation.json", data)
    folder.write_bytes("correlation.png", figure(data, tuple(facts["networks"])))
    return data
