"""From trainings to points: means over seeds, and how each dynamic network stands to the static ones' curve."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dynaconv.study.curve_settings import DENSE, METHODS

POINT = ("image_size", "object_share", "method", "budget", "width")
MEANS = (
    "accuracy", "executed_macs", "share", "conditional_ratio", "conditional_ratio_before", "accuracy_before",
)  # fmt: skip
ORDER = (DENSE, *METHODS)
Row = Mapping[str, Any]


def point_of(row: Row) -> tuple[Any, ...]:
    """What rows of one point have in common: all but the seed."""
    return tuple(row[key] for key in POINT)


def point_name(row: Row) -> str:
    """The same as one word, a key of times.json."""
    return "/".join(f"{key}={row[key]}" for key in POINT if row[key] is not None)


def summarise(
    rows: Sequence[Row], times: Mapping[str, Mapping[str, Row]] | None = None
) -> list[dict[str, Any]]:
    """One row a point: means over seeds (`_std`: sample deviation, None for one seed).

    ms_B and engine_B: milliseconds of a batch of B pictures (median) where they were measured. gain_macs, gain_ms_B:
    the accuracy minus that of static networks on the same pictures at equal multiply-adds or milliseconds; None left of
    the smallest static network.
    """
    points = []
    for found in dict.fromkeys(point_of(row) for row in rows):
        own = [row for row in rows if point_of(row) == found]
        points.append(_point(own, (times or {}).get(point_name(own[0]), {})))
    points.sort(key=_order)
    for point in points:
        _compare(point, [p for p in points if pictures_of(p) == pictures_of(point) and p["method"] == DENSE])
    return points


def _order(point: Row) -> tuple[Any, ...]:
    first = [-1.0 if value is None else value for value in pictures_of(point)]
    return *first, ORDER.index(point["method"]), point["budget"] or point["width"] or 0


def pictures_of(point: Row) -> tuple[Any, Any]:
    """Size of the pictures and share of the object."""
    return point["image_size"], point["object_share"]


def _point(rows: Sequence[Row], times: Mapping[str, Row]) -> dict[str, Any]:
    done = [row for row in rows if "accuracy" in row]
    point: dict[str, Any] = {key: rows[0][key] for key in POINT}
    point |= {"seeds": len(done), "dense_macs": rows[0]["dense_macs"]}
    for key in (
        "accuracy",
        "executed_macs",
        "share",
        "conditional_ratio",
        "conditional_ratio_before",
        "accuracy_before",
    ):
        values = [row[key] for row in done if key in row]
        point[f"{key}_mean"] = statistics.fmean(values) if values else None
        if key in ("accuracy", "executed_macs"):
            point[f"{key}_std"] = statistics.stdev(values) if len(values) > 1 else None
    dynamic = [row for row in done if "conditional_target" in row]
    point["budget_error_before"] = _mean(row["budget_error_before"] for row in dynamic)
    errors = [abs(row["conditional_ratio"] - row["conditional_target"]) for row in dynamic]
    point["worst_error_after"] = max(errors, default=None)
    reasons = [row.get("unreachable") or row.get("diverged") for row in rows]
    point["left_out"] = next((reason for reason in reasons if reason), None)
    for batch, measured in times.items():
        point[f"ms_{batch}"], point[f"engine_{batch}"] = measured["median_ms"], measured["engine"]
    return point


def _mean(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.fmean(values) if values else None


def _compare(point: dict[str, Any], static: Sequence[Row]) -> None:
    for key in batches_of([point]):
        point[f"gain_ms_{key}"] = _gain(point, static, f"ms_{key}")
    point["gain_macs"] = _gain(point, static, "executed_macs_mean")


def _gain(point: Row, static: Sequence[Row], cost: str) -> float | None:
    if point["method"] == DENSE or point["accuracy_mean"] is None or point.get(cost) is None:
        return None
    curve = [(p[cost], p["accuracy_mean"]) for p in static if p.get(cost) is not None and p["seeds"]]
    reached = static_accuracy(curve, point[cost])
    return None if reached is None else point["accuracy_mean"] - reached


def static_accuracy(curve: Sequence[tuple[float, float]], cost: float) -> float | None:
    """What static networks reach for a cost: straight lines between points (cost, accuracy), never falling.

    None left of the cheapest; right of the dearest, the best of all.

    >>> static_accuracy([(1.0, 0.5), (3.0, 0.7), (4.0, 0.6)], 2.0)
    0.6
    """
    best, rising = 0.0, []
    for at, accuracy in sorted(curve):
        best = max(best, accuracy)
        rising.append((at, best))
    if not rising or cost < rising[0][0]:
        return None
    for (a, low), (b, high) in itertools.pairwise(rising):
        if cost <= b:
            return high if b == a else low + (high - low) * (cost - a) / (b - a)
    return rising[-1][1]


def batches_of(points: Sequence[Row]) -> list[str]:
    """Batch sizes that were timed."""
    names = dict.fromkeys(key for point in points for key in point if key.startswith("ms_"))
    return sorted((name.removeprefix("ms_") for name in names), key=int)


def verdict(point: Row, points: Sequence[Row], batch: str) -> str | None:
    """How a dynamic point stands to the static networks on the same pictures in milliseconds of a batch.

    "beat" or "do not beat" within their range; "are faster than all of", "are slower than all of" outside; None where
    nothing was timed.
    """
    key = f"ms_{batch}"
    static = [
        p[key] for p in points if p["method"] == DENSE and pictures_of(p) == pictures_of(point) and key in p
    ]
    if point["method"] == DENSE or key not in point or not static:
        return None
    if point[key] < min(static):
        return "are faster than all of"
    if point[key] > max(static):
        return "are slower than all of"
    return "beat" if point[f"gain_{key}"] > 0 else "do not beat"
