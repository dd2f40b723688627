"""Histograms and buckets of the correlations, static against dynamic."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dynaconv.report.figures import BLUE, ORANGE, house_style, new_figure, png
from dynaconv.study.correlation import BUCKETS, INSIDE

KINDS = {"features": "Feature maps: channels", "kernels": "Kernels: filters"}
_COLOURS = {"static": ORANGE, "dynamic": BLUE}


def figure(found: Mapping[str, Any], names: tuple[str, str]) -> bytes:
    """PNG bytes; `found` from `correlate`, `names` of the static and the dynamic network."""
    labels = dict(zip(_COLOURS, names, strict=True))
    with house_style():
        drawn, _ = new_figure(10.5, 6.6)
        drawn.clear()
        panels = drawn.subplots(2, 2)
        for column, (kind, title) in enumerate(KINDS.items()):
            layer = found["layers" if kind == "features" else "kernel_layers"]
            _histogram(panels[0, column], found[kind], labels)
            where = layer[1] if layer[0] == layer[1] else f"{layer[0]} and {layer[1]}"
            panels[0, column].set_title(f"{title} of {where}")
            _buckets(panels[1, column], found[kind], found["thresholds"])
        handles, texts = panels[0, 0].get_legend_handles_labels()
        drawn.legend(handles, texts, loc="outside lower center", ncols=3, frameon=False)
        return png(drawn)


def _histogram(axes: Any, found: Mapping[str, Any], labels: Mapping[str, str]) -> None:
    for kind, colour in _COLOURS.items():
        result = found[kind]
        edges, shares = np.asarray(result["edges"]), np.asarray(result["histogram"])
        density = 100 * shares / np.diff(edges) * 0.05
        axes.stairs(density, edges, color=colour, lw=1.8, label=f"{kind}: {labels[kind]}")
    axes.axvspan(*INSIDE, color="#e9eef2", zorder=0, lw=0, label="-0.1 to 0.2")
    axes.set(xlim=(-1, 1), xlabel="Pearson correlation r of two rows", ylabel="% of pairs, per 0.05 of r")
    axes.set_ylim(bottom=0)


def _buckets(axes: Any, found: Mapping[str, Any], thresholds: Mapping[str, float]) -> None:
    s, m, w = thresholds["strong"], thresholds["middle"], thresholds["weak"]
    names = [f"S\n≥ {s:g}", f"M\n≥ {m:g}", f"W\n≥ {w:g}", f"N\n< {w:g}", "r in\n-0.1 .. 0.2"]
    for shift, (kind, colour) in zip((-0.2, 0.2), _COLOURS.items(), strict=True):
        result = found[kind]
        values = [100 * result["buckets"][b] for b in BUCKETS] + [100 * result["inside"]]
        bars = axes.bar(np.arange(5) + shift, values, 0.38, color=colour)
        axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    axes.axvline(3.5, color="#8a929b", lw=0.8)
    axes.set_xticks(range(5), names)
    axes.set(ylabel="% of pairs", xlabel="|r|: strong, middle, weak, none")
    axes.set_ylim(0, 108)
    axes.grid(axis="x", visible=False)
