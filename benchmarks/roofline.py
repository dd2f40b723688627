"""Each layer of the compiled network against this machine's peaks, both measured on the spot."""

from __future__ import annotations

import argparse
import sys

import torch
from tables import digits, markdown

from dynaconv.measure.race import TITLES, Runner, compile_for, forced, race
from dynaconv.measure.roofline import measure_peaks, timed_steps


def roofline(name: str, dense, dynamic, batch: int, args: argparse.Namespace) -> dict:
    """Every step of the static network: ms, GFLOP/s, GB/s; with --densities below 1, of the masked one."""
    density, precision = args.densities[0], args.precision[0]
    masked = density < 1 and dynamic is not None
    x = torch.randn(batch, *args.input_size)
    # The check against eager PyTorch comes first, here as everywhere.
    runners = [Runner(f"density {density:g}", dynamic, density)] if masked else []
    checked = race(dense, runners, x, rivals=[], precisions=[precision], rounds=1, executor=False)
    if checked.left_out:
        sys.exit(f"{name}: {'; '.join(f'{TITLES[k]}: {v}' for k, v in checked.left_out.items())}")
    fast = compile_for(dynamic if masked else dense, x, precision)
    peaks = measure_peaks(torch.get_num_threads())
    with forced(fast, density if masked else None):
        timed = timed_steps(fast, x, args.rounds)
    steps = []
    for step in timed:
        computing = step.work.macs / peaks.macs[precision]
        reading = step.work.bytes / peaks.bandwidth(step.work.bytes)
        steps.append({
            "layer": step.layer, "kind": step.kind, "ms": step.seconds * 1e3, "macs": step.work.macs,
            "bytes": step.work.bytes, "bound": "compute" if computing > reading else "memory",
            "of_roof": max(computing, reading) / step.seconds if step.seconds else None,
        })  # fmt: skip
    row = {"network": name, "batch": batch, "precision": precision, "density": density if masked else None}
    row |= {"peak_macs": peaks.macs, "peak_read": {str(k): v for k, v in peaks.read.items()}, "steps": steps}
    show(row, peaks.line())
    return row


def show(row: dict, peaks: str) -> None:
    """A markdown table of the steps, in order, with the total."""
    masks = "static" if row["density"] is None else f"density {row['density']:g}"
    print(f"\n{row['network']}, batch {row['batch']}, {row['precision']}, {masks}; {peaks}\n")
    total = sum(s["ms"] for s in row["steps"])
    cells = [
        (
            s["layer"], s["kind"], digits(s["ms"]), f"{100 * s['ms'] / total:.1f} %", *rates(s), s["bound"],
            s["of_roof"] and f"{s['of_roof']:.2f}",
        )
        for s in row["steps"]
    ]  # fmt: skip
    macs, size = (sum(s[key] for s in row["steps"]) for key in ("macs", "bytes"))
    whole = {"macs": macs, "bytes": size, "ms": total}
    cells.append(("all", "", digits(total), "100 %", *rates(whole), "", ""))
    print(
        markdown(("layer", "step", "ms", "of all", "GFLOP/s", "GB/s", "bound by", "of its roof"), cells),
        flush=True,
    )


def rates(step: dict) -> tuple[str, str]:
    """Achieved GFLOP/s (twice the multiply-adds) and GB/s."""
    seconds = max(step["ms"], 1e-9) / 1e3
    return digits(2 * step["macs"] / seconds / 1e9), digits(step["bytes"] / seconds / 1e9)
