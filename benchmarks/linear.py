"""Does time follow the executed multiply-adds? A straight line through one network at ten densities."""

from __future__ import annotations

import argparse
import sys

import numpy as np
import torch
from tables import digits, markdown

import dynaconv as dc
from dynaconv.measure.race import OURS, Runner, race

DENSITIES = tuple(round(0.1 * k, 1) for k in range(1, 11))


def linear(name: str, dense, dynamic, batch: int, args: argparse.Namespace) -> dict:
    """Time our engine at densities 0.1 to 1, and 0, in one interleaved run; fit minima to executed multiply-adds.

    Density 0 is measured and left out of the fit: it is what the intercept is held against.
    """
    x, precision = torch.randn(batch, *args.input_size), args.precision[0]
    runners = [Runner(f"{density:g}", dynamic, density) for density in (0.0, *DENSITIES)]
    result = race(
        dense, runners, x, rivals=[], precisions=[precision], rounds=args.rounds, seconds=args.seconds,
        executor=False, progress=lambda line: print(line, file=sys.stderr),
    )  # fmt: skip
    ours = OURS[precision]
    if ours not in result.dense:
        sys.exit(f"{name}: {result.left_out.get(ours)}")
    dense_macs = batch * dc.profile(dense, x[:1], include_linear=True).dense_macs
    static = result.dense[ours]["min_ms"]
    macs = np.array([result.macs_ratio[f"{d:g}"] for d in DENSITIES]) * dense_macs / 1e9
    times = np.array([result.dynamic[f"{d:g}"][ours]["min_ms"] for d in DENSITIES])
    row = {"network": name, "batch": batch, "precision": precision, "static_ms": static, **fit(macs, times)}
    row["closed_ms"] = result.dynamic["0"][ours]["min_ms"]
    row["closed_macs_ratio"] = result.macs_ratio["0"]
    row["worst_ratio_to_static"] = float(times.max() / static)
    row["points"] = [
        {"density": d, "gmacs": float(m), "min_ms": float(t)}
        for d, m, t in zip(DENSITIES, macs, times, strict=True)
    ]
    show(row)
    return row


def fit(macs: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Least squares of milliseconds on GMACs: slope, intercept, and the share of the variance that they explain.

    >>> fit(np.array([1.0, 2.0, 3.0]), np.array([3.0, 5.0, 7.0]))["r2"]
    1.0
    """
    slope, intercept = np.polyfit(macs, times, 1)
    rest = times - (slope * macs + intercept)
    r2 = 1 - float((rest**2).sum() / ((times - times.mean()) ** 2).sum())
    return {"ms_per_gmac": float(slope), "intercept_ms": float(intercept), "r2": round(r2, 6)}


def show(row: dict) -> None:
    """One markdown table, and the line through it."""
    cells = [
        (
            f"{p['density']:g}",
            digits(p["gmacs"]),
            digits(p["min_ms"]),
            f"{p['min_ms'] / row['static_ms']:.3f}",
        )
        for p in row["points"]
    ]
    print(f"\n{row['network']}, batch {row['batch']}, {row['precision']}\n")
    print(markdown(("density", "executed GMAC", "ms (minimum)", "of our static network"), cells))
    print(
        f"\ntime = {row['intercept_ms']:.3f} ms + {row['ms_per_gmac']:.3f} ms per GMAC, R² = {row['r2']:.4f}; "
        f"measured with every mask empty: {row['closed_ms']:.3f} ms at {row['closed_macs_ratio']:.3f} of the MACs; "
        f"static network: {row['static_ms']:.3f} ms",
        flush=True,
    )
