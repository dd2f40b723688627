"""Entropy, distribution, classes, interventions and temperature in one figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dynaconv.report.figures import BLUE, GREEN, ORANGE, PINK, house_style, png

_COLOURS = (BLUE, ORANGE, GREEN, PINK)
Rows = Sequence[Mapping[str, Any]]


def figure(found: Mapping[str, Any], title: str) -> bytes:
    """PNG bytes; `found` from `attention`, `title` the network's name."""
    from matplotlib.figure import Figure

    layers = found["layers"]
    with house_style():
        drawn = Figure(figsize=(13.5, 8.4), layout="constrained")
        # Two figures in one, so that the long names below do not narrow what is above.
        above, below = drawn.subfigures(2, 1)
        for axes, draw, rows in zip(
            above.subplots(1, 3),
            (_entropy, _distribution, _classes),
            (layers, [row for row in layers if row["histogram"]], found),
            strict=True,
        ):
            draw(axes, rows)
        swept = bool(found["temperature"])
        panels = below.subplots(1, 1 + swept, width_ratios=[1.7, 1][: 1 + swept], squeeze=False)[0]
        _accuracy(panels[0], found["accuracy"])
        if swept:
            _temperature(panels[1], found["temperature"], found["trained_temperature"])
        drawn.suptitle(
            f"Attention of {title}, {found['images']:,} test pictures", x=0.01, ha="left", fontsize=13
        )
        return png(drawn)


def _names(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["layer"] for row in rows))


def _short(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "block")


def _entropy(axes: Any, rows: Rows) -> None:
    names = _names(rows)
    shown = [row for row in rows if row["entropy"] is not None]
    for colour, part in zip(_COLOURS, dict.fromkeys(row["part"] for row in shown), strict=False):
        own = [row for row in shown if row["part"] == part]
        xs = [names.index(row["layer"]) for row in own]
        ys, spread = [row["entropy"] for row in own], [row["entropy_std"] for row in own]
        axes.errorbar(xs, ys, yerr=spread, fmt="o-", ms=4, lw=1.3, capsize=3, color=colour, label=part)
    low = min((row["entropy"] - row["entropy_std"] for row in shown), default=0.0)
    axes.set_ylim(max(0.0, low - 0.1 * (1 - low) - 0.01), 1 + 0.05 * (1 - low) + 0.002)
    step = max(1, -(-len(names) // 16))
    places = range(0, len(names), step)
    axes.set_xticks(places, [_short(names[i]) for i in places], rotation=60, ha="right", fontsize=8)
    axes.set_title("Entropy (1 = uniform), std over pictures")
    axes.legend(fontsize=8.5)


def _distribution(axes: Any, rows: Rows) -> None:
    """A row for each layer (and part): how often the coefficients take which value."""
    if not rows:
        axes.set_axis_off()
        return
    top = max(row["histogram_top"] for row in rows)
    bins = 20
    heat = np.zeros((len(rows), bins))
    for line, row in zip(heat, rows, strict=True):
        centres = (np.arange(bins) + 0.5) / bins * row["histogram_top"]
        places = np.minimum((centres / top * bins).astype(int), bins - 1)
        np.add.at(line, places, row["histogram"])
    image = axes.imshow(100 * heat, aspect="auto", cmap="Blues", extent=(0, top, len(rows) - 0.5, -0.5))
    parts = list(dict.fromkeys(row["part"] for row in rows))
    # The parts of a layer follow each other; the layer's name stands at the first of them.
    first = [i for i, row in enumerate(rows) if i == 0 or rows[i - 1]["layer"] != row["layer"]]
    first = first[:: max(1, -(-len(first) // 16))]
    axes.set_yticks(first, [_short(rows[i]["layer"]) for i in first], fontsize=8)
    axes.grid(visible=False)
    below = f": {', '.join(parts)}" if len(parts) > 1 else ""
    axes.set_xlabel(f"value of a coefficient{below}", fontsize=8.5)
    axes.set_title("Distribution (% of coefficients)")
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def _classes(axes: Any, found: Mapping[str, Any]) -> None:
    """Mean coefficients of every class where classes differ most."""
    able = {(row["layer"], row["part"]) for row in found["classes"] if row["means"]}
    rows = [row for row in found["layers"] if (row["layer"], row["part"]) in able]
    if not rows:
        axes.set_axis_off()
        return
    best = max(rows, key=lambda row: row["class_share"])
    own = [r for r in found["classes"] if (r["layer"], r["part"]) == (best["layer"], best["part"])]
    step = max(1, -(-len(own) // 20))
    own = own[::step]
    image = axes.imshow(np.array([row["means"] for row in own]), aspect="auto", cmap="viridis")
    axes.set_yticks(range(len(own)), [str(row["class"]) for row in own], fontsize=8)
    axes.set_xlabel(f"{best['part']} of {_short(best['layer'])}")
    axes.grid(visible=False)
    axes.set_title(f"By class ({100 * best['class_share']:.0f} % of the variance)")
    axes.locator_params(axis="x", integer=True)
    axes.figure.colorbar(image, ax=axes, pad=0.02)


def _accuracy(axes: Any, rows: Rows) -> None:
    rows = [row for row in rows if row["part"] == "all"] + [row for row in rows if row["part"] != "all"]
    names = [r["intervention"] + ("" if r["part"] == "all" else f": {r['part']}") for r in rows][::-1]
    values = [100 * row["accuracy"] for row in rows][::-1]
    colours = [
        ORANGE if r["intervention"] == "normal" else BLUE if r["part"] == "all" else "#8fbfe4" for r in rows
    ]
    bars = axes.barh(range(len(rows)), values, color=colours[::-1])
    axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.set_yticks(range(len(rows)), names, fontsize=8.5)
    axes.set_xlim(0, min(108, 1.12 * max(values) + 1))
    axes.grid(axis="y", visible=False)
    axes.set(xlabel="test accuracy (%)")
    axes.set_title("Accuracy when the coefficients are changed at evaluation")


def _temperature(axes: Any, rows: Rows, trained: Sequence[float]) -> None:
    xs = [row["temperature"] for row in rows]
    axes.plot(xs, [100 * row["accuracy"] for row in rows], "o-", color=BLUE, ms=4, label="accuracy (%)")
    axes.plot(
        xs, [100 * row["entropy"] for row in rows], "s--", color=ORANGE, ms=4, label="entropy (% of uniform)"
    )
    for value in trained:
        axes.axvline(value, color="#8a929b", lw=1, ls=":")
    axes.set_xscale("log")
    axes.set_xticks(xs, [f"{x:g}" for x in xs], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, 104)
    axes.set_xlabel("temperature at evaluation (dotted: as trained)")
    axes.set_title("Effect of temperature")
    axes.legend(fontsize=8.5)
