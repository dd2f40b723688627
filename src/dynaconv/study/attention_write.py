"""The files of an attention study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaconv.study.attention_figure import figure
from dynaconv.study.folder import StudyFolder

LAYERS = (
    *("layer", "part", "kind", "coefficients", "experts", "mean", "std_over_images"),
    *("entropy", "entropy_std", "largest_share", "class_share"),
)
CLASSES = ("layer", "part", "class", "images", "entropy", "largest_share", "means")
ACCURACY = ("intervention", "part", "accuracy", "loss", "images")
TEMPERATURE = ("temperature", "accuracy", "loss", "entropy")
HISTOGRAM = ("layer", "part", "low", "high", "share")


def write(folder: StudyFolder, found: Mapping[str, Any], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write attention.json, layers.csv, histogram.csv, classes.csv, accuracy.csv, temperature.csv and attention.png.

    Args:
        found: from `attention`. facts: network, data, machine, ...
    Returns:
        What attention.json holds.
    """
    data = {"study": folder.study, **facts, **found}
    classes = [{**row, "means": " ".join(f"{v:.6g}" for v in row["means"] or ())} for row in found["classes"]]
    folder.claim({key: facts[key] for key in ("network", "data")})
    folder.write_csv("layers.csv", LAYERS, found["layers"])
    folder.write_csv("histogram.csv", HISTOGRAM, _histogram(found))
    folder.write_csv("classes.csv", CLASSES, classes)
    folder.write_csv("accuracy.csv", ACCURACY, found["accuracy"])
    if found["temperature"]:
        folder.write_csv("temperature.csv", TEMPERATURE, found["temperature"])
    folder.write_json("attention.json", data)
    folder.write_bytes("attention.png", figure(found, str(facts["network"])))
    return data


def _histogram(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for row in found["layers"]:
        shares = row["histogram"] or []
        for i, share in enumerate(shares):
            low, high = (round((i + end) / len(shares) * row["histogram_top"], 6) for end in (0, 1))
            rows.append(
                {"layer": row["layer"], "part": row["part"], "low": low, "high": high, "share": share}
            )
    return rows
