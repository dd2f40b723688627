"""`dynaconv bench kernels`: the strategies of dynamic convolutions, timed on this machine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from dynaconv._table import format_table
from dynaconv.cli.outcome import CommandFailed, Outcome, number, say

BATCHES = (1, 8, 32)
ROUNDS = 7
LAYOUTS = {"both": (False, True), "contiguous": (False,), "channels-last": (True,)}


def run_kernels(args: Any) -> Outcome:
    """Time all strategies over the built-in shapes; with --write, make the table that `auto` reads.

    Raises:
        CommandFailed: a strategy disagrees with the others; nothing is written then.
    """
    from tqdm import tqdm

    from dynaconv.cost import machine_line
    from dynaconv.measure.kernels import SHAPES, measure_kernels, to_dict, write_table

    batches, layouts = tuple(args.batch or BATCHES), LAYOUTS[args.layout]
    if args.write and (args.layout != "both" or args.batch):
        raise ValueError("--write needs all layouts and batch sizes; leave --layout and --batch out")
    bar = tqdm(total=len(SHAPES) * len(batches) * len(layouts) * 2, desc="kernels", disable=None, leave=False)
    try:
        rounds = args.rounds or ROUNDS
        timings = list(measure_kernels(SHAPES, batches, rounds=rounds, layouts=layouts, progress=bar.update))
    except RuntimeError as error:
        raise CommandFailed(str(error)) from error
    finally:
        bar.close()
    data = {"machine": machine_line(), "timings": [to_dict(t) for t in timings], "summary": _summary(timings)}
    if args.write:
        say(f"wrote {write_table(timings)}")
    return Outcome(_text(data, timings), data)


def _summary(timings: Sequence[Any]) -> list[dict[str, Any]]:
    """Geometric means over the shapes, for each batch size, mode and layout."""
    groups: dict[tuple, list[Any]] = {}
    for t in timings:
        groups.setdefault((t.training, t.channels_last, t.batch), []).append(t)
    rows = []
    for (training, layout, batch), members in groups.items():
        best = [t.strategies[t.fastest] / t.entries["auto"]["min_ms"] for t in members]
        row = {"training": training, "channels_last": layout, "batch": batch, "best_over_auto": _mean(best)}
        for rival in ("static", "timm"):
            ratios = [t.over(rival) for t in members if t.over(rival) is not None]
            row[f"auto_over_{rival}"] = _mean(ratios) if ratios else None
        rows.append(row)
    return rows


def _mean(values: Sequence[float]) -> float:
    return math.exp(sum(math.log(v) for v in values) / len(values))


def _text(data: dict[str, Any], timings: Sequence[Any]) -> str:
    columns = ["static", "timm", "grouped", "feature", "unfold", "bmm", "single", "compiled", "auto"]
    rows = []
    for t in timings:
        cells = [number(t.entries.get(c, {}).get("min_ms"), ".2f") for c in columns]
        memory = [number(t.entries.get(c, {}).get("peak_mib"), ".1f") for c in ("timm", "auto")]
        rows.append((t.shape.label, t.batch, *_mode(t.training, t.channels_last), *cells, t.fastest, *memory))
    header = (
        "shape",
        "batch",
        "mode",
        "layout",
        *columns,
        "fastest",
        "timm MiB",
        "auto MiB",
    )
    means = [
        (
            s["batch"],
            *_mode(s["training"], s["channels_last"]),
            number(s["auto_over_static"], ".2f"),
            number(s["auto_over_timm"], ".2f"),
            number(s["best_over_auto"], ".2f"),
        )
        for s in data["summary"]
    ]
    names = ("batch", "mode", "layout", "static / auto", "timm / auto", "best / auto")
    return "\n".join(
        [
            "Milliseconds (minimum) of one dynamic convolution with 4 experts, coefficients given; peak memory in MiB.",
            data["machine"],
            "",
            format_table(header, rows, "lrll" + "r" * len(columns) + "lrr"),
            "",
            "Geometric means over the shapes; above 1, auto is faster.",
            format_table(names, means, "rllrrr"),
        ]
    )


def _mode(training: bool, layout: bool) -> tuple[str, str]:
    return ("step" if training else "forward", "channels-last" if layout else "contiguous")
