"""Accuracy against parameters and against multiply-adds, with error bars over seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dynaconv.report.figures import house_style, new_figure, png
from dynaconv.study.methods import parse_method

COLOURS = {
    "static": "#1a1e24",
    "condconv": "#b9520f",
    "dyconv": "#0b6bb0",
    "dynet": "#a8477f",
    "dcd": "#00805c",
    "odconv": "#8a6d00",
    "weightnet": "#6a6f78",
}
MARKERS = {
    "static": "s",
    "condconv": "^",
    "dyconv": "o",
    "dynet": "D",
    "dcd": "P",
    "odconv": "v",
    "weightnet": "X",
}


def figure(methods: Sequence[Mapping[str, Any]], data: str) -> bytes:
    """PNG bytes; `methods` from `summarise`, `data` the data set's name."""
    shown = [row for row in methods if row["accuracy_mean"] is not None]
    seeds = max(row["seeds"] for row in shown)
    spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    with house_style():
        drawn, (left, right) = new_figure(10.5, 4.4, 2)
        for axes, key, label in (
            (left, "params", "parameters (thousands)"),
            (right, "macs", "multiply-adds of one image (millions): static, mixing and routing"),
        ):
            scale = 1e3 if key == "params" else 1e6
            _points(axes, shown, [row[key] / scale for row in shown])
            axes.set(xlabel=label, ylabel="test accuracy (%)")
        left.set_title(f"Accuracy against parameters, {data}")
        right.set_title(f"Accuracy against MACs ({spread})")
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return png(drawn)


def _points(axes: Any, rows: Sequence[Mapping[str, Any]], xs: Sequence[float]) -> None:
    for row, x in zip(rows, xs, strict=True):
        method = parse_method(row["method"])
        axes.errorbar(
            x,
            100 * row["accuracy_mean"],
            yerr=None if row["accuracy_std"] is None else 100 * row["accuracy_std"],
            fmt=MARKERS[method.kind],
            color=COLOURS[method.kind],
            ms=8,
            capsize=4,
            elinewidth=1.4,
            label=method.title,
        )
    static = sorted(
        (x, 100 * row["accuracy_mean"])
        for row, x in zip(rows, xs, strict=True)
        if parse_method(row["method"]).kind == "static"
    )
    if len(static) > 1:
        axes.plot(*zip(*static, strict=True), color=COLOURS["static"], lw=1)
    base = next((row for row in rows if row["method"] == "static"), None)
    if base is not None:
        axes.axhline(100 * base["accuracy_mean"], color="#8a929b", lw=0.9, ls=":")
    axes.margins(x=0.12, y=0.15)
