"""Milliseconds of a dynamic network beside its dense rivals, as results.json and `dynaconv bench --json` hold them."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from dynaconv.convert import revert_
from dynaconv.measure.race import EAGER, OURS, TITLES, Race


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of a dynamic network without its gates: same architecture, same weights, everything computed."""
    twin = copy.deepcopy(model)
    revert_(twin)
    return twin.eval()


def dense_latency(result: Race, precision: str = "float32") -> dict[str, Any]:
    """The static network: its fastest engine of this precision, ours among them, and all others.

    Returns:
        {"min_ms", "median_ms", "runs", "engine": name, "engines": {name: {"min_ms", "median_ms", "runs"}}}.
    """
    name = result.fastest(precision)
    return {**result.dense[name], "engine": name, "engines": result.dense}


def dynamic_latency(result: Race, label: str, precision: str = "float32") -> dict[str, Any]:
    """A dynamic network: our engine where it ran, else the eager executor, against the fastest dense engine.

    Returns:
        {"min_ms", "median_ms", "runs", "ratio_min", "ratio_median", "engine": name, "engines": {name: the same}}; a
        ratio is dynamic over fastest dense, below 1 is faster: minimum over least minimum, median over least median.
    """
    least, middle = (result.dense[result.fastest(precision, by=key)][key] for key in ("min_ms", "median_ms"))
    engines = {
        name: {
            **times,
            "ratio_min": times["min_ms"] / least,
            "ratio_median": times["median_ms"] / middle,
        }
        for name, times in result.dynamic[label].items()
    }
    name = OURS[precision] if OURS[precision] in engines else EAGER
    return {**engines[name], "engine": name, "engines": engines}


def left_out_line(left_out: dict[str, str]) -> str:
    """One line that names the engines that were not timed, with the reasons; empty where all were."""
    if not left_out:
        return ""
    reasons: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        reasons.setdefault(reason, []).append(TITLES.get(name, name))
    return "not timed: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items())
