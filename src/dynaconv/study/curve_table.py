"""The points of the study for people: a table, and in words which dynamic networks beat the static ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynaconv._table import format_table
from dynaconv.study.curve_points import Row, batches_of, pictures_of, verdict
from dynaconv.study.curve_settings import DENSE, TITLES


def title(point: Row) -> str:
    """A point in words."""
    name = TITLES[point["method"]]
    if point["method"] == DENSE:
        return name if point["width"] is None else f"{name}, width {point['width']}"
    return f"{name} {point['budget']:g}"


def table(data: Mapping[str, Any]) -> str:
    """The points for people, and which of them beat the static networks."""
    points, batches = data["points"], batches_of(data["points"])
    several = len({pictures_of(p) for p in points}) > 1
    header = [*(("pictures",) if several else ()), "network", "seeds", "accuracy", "MMac", "share", "error before",
              "error after", "at equal MACs"]  # fmt: skip
    for batch in batches:
        header += [f"ms, batch {batch}", "engine", "at equal ms"]
    rows = [[*((_pictures_text(p),) if several else ()), *_cells(p, batches)] for p in points]
    text = [format_table(header, rows, "l" * (1 + several) + "r" * (len(header) - 1 - several))]
    text.append(
        "accuracy on test pictures; share: executed multiply-adds over those of the full static network; errors of the "
        "share of what gates can skip, before calibration (training alone) and after it; at equal MACs or ms: accuracy "
        "minus that of static networks there, in points ('cheaper': left of the smallest static network)"
    )
    text += _starts(data["rows"])
    text += [line for batch in batches for line in _verdict(points, batch)]
    text += [f"left out: {title(p)}: {p['left_out']}" for p in points if p["left_out"]]
    return "\n".join(text)


def _starts(rows: Sequence[Row]) -> list[str]:
    """What the dense starts reached, with a warning where one has hardly learned."""
    starts = [row["dense_start_accuracy"] for row in rows if row.get("dense_start_accuracy") is not None]
    if not starts:
        return []
    low, high = 100 * min(starts), 100 * max(starts)
    text = f"dense starts: {low:.2f} %" if low == high else f"dense starts: {low:.2f} to {high:.2f} %"
    static = [row["accuracy"] for row in rows if row["method"] == DENSE and "accuracy" in row]
    if static and min(starts) < 0.8 * min(static):
        text += (
            "; far below the static networks, so what starts there means little: give it more --dense-epochs"
        )
    return [text]


def _pictures_text(point: Row) -> str:
    share = "" if point["object_share"] is None else f", object {point['object_share']:g}"
    return f"{point['image_size']} px{share}"


def _cells(point: Row, batches: Sequence[str]) -> list[str]:
    if point["accuracy_mean"] is None:
        return [title(point), "0", "-", "-", "-", "-", "-", "-", *(["-"] * 3 * len(batches))]
    spread = "" if point["accuracy_std"] is None else f" ± {100 * point['accuracy_std']:.2f}"
    cells = [title(point), str(point["seeds"]), f"{100 * point['accuracy_mean']:.2f} %{spread}"]
    cells += [f"{point['executed_macs_mean'] / 1e6:.2f}", f"{point['share_mean']:.3f}"]
    before, after = point["budget_error_before"], point["worst_error_after"]
    cells += ["" if before is None else f"{before:+.3f}", "" if after is None else f"{after:.4f}"]
    cells += [_gain_text(point, "gain_macs")]
    for batch in batches:
        ms = point.get(f"ms_{batch}")
        if ms is None:
            cells += ["-"] * 3
        else:
            cells += [f"{ms:.3f}", point[f"engine_{batch}"], _gain_text(point, f"gain_ms_{batch}")]
    return cells


def _gain_text(point: Row, key: str) -> str:
    if point["method"] == DENSE:
        return ""
    gain = point.get(key)
    return "cheaper" if gain is None else f"{100 * gain:+.2f}"


def _verdict(points: Sequence[Row], batch: str) -> list[str]:
    groups: dict[str, list[str]] = {}
    for point in points:
        word = verdict(point, points, batch)
        share = "" if point["object_share"] is None else f" (object {point['object_share']:g})"
        if word is not None:
            groups.setdefault(word, []).append(f"{title(point)}{share}")
    return [
        f"milliseconds at batch {batch}: {word} the static networks: {', '.join(groups[word])}"
        for word in sorted(groups)
    ]
