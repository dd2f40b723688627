"""Milliseconds of results.json as cells of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dynaconv._table import format_table

TIMES_ARE = "ms: our engine where it runs, in brackets over the fastest dense engine in float32"


def times(entry: dict[str, Any], batches: Sequence[str]) -> list[str]:
    """One cell for each batch size: median and its ratio; a dash where nothing was timed.

    >>> times({"latency": {"1": {"median_ms": 2.0, "ratio_median": 0.5}}}, ["1", "32"])
    ['2.00 (0.50)', '-']
    """
    cells = []
    for batch in batches:
        time_ms = entry.get("latency", {}).get(batch)
        ratio = f" ({time_ms['ratio_median']:.2f})" if time_ms and "ratio_median" in time_ms else ""
        cells.append(f"{time_ms['median_ms']:.2f}{ratio}" if time_ms else "-")
    return cells


def every_engine(results: dict[str, Any]) -> str:
    """A table of all engines on the dense network and at every budget; empty where nothing was timed."""
    from dynaconv.measure import left_out_line
    from dynaconv.measure.race import EAGER, TITLES

    networks = [("dense", results["dense"]), *((f"{p['target']:g}", p) for p in results["points"])]
    batches = list(results["dense"].get("latency", {}))
    rows = []
    for label, network in networks:
        timed = network.get("latency", {})
        for name in dict.fromkeys(name for b in batches for name in timed.get(b, {}).get("engines", {})):
            title = "eager executor" if name == EAGER and label != "dense" else TITLES.get(name, name)
            found = {
                b: timed[b]["engines"][name] for b in batches if name in timed.get(b, {}).get("engines", {})
            }
            rows.append((label, title, *times({"latency": found}, batches)))
    if not rows:
        return ""
    header = ("budget", "engine", *(f"ms at batch {batch}" for batch in batches))
    table = format_table(header, rows, "ll" + "r" * len(batches))
    return "\n".join(line for line in (table, left_out_line(results.get("left_out", {}))) if line)
