"""Accuracy against budget: one network for all, and a network for each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dynaconv.report.figures import house_style, new_figure, png
from dynaconv.study.dial import TITLES

STYLES = {"dial": ("#0b6bb0", "o-"), "one": ("#b9520f", "^--"), "special": ("#1a1e24", "s:")}


def figure(data: Mapping[str, Any]) -> bytes:
    """PNG bytes of accuracy against the executed share, and of the share's error against the budget asked for."""
    seeds = max(point["seeds"] for point in data["points"])
    spread = f"mean and standard deviation of {seeds} seeds" if seeds > 1 else "one seed"
    with house_style():
        drawn, (left, right) = new_figure(10.5, 4.4, 2)
        for kind, (colour, style) in STYLES.items():
            points = [p for p in data["points"] if p["kind"] == kind]
            xs = [p["ratio"] for p in points]
            errors = None if seeds == 1 else [100 * (p["accuracy_std"] or 0.0) for p in points]
            ys = [100 * p["accuracy_mean"] for p in points]
            left.errorbar(xs, ys, yerr=errors, fmt=style, color=colour, ms=5, capsize=3, label=TITLES[kind])
            right.plot([p["budget"] for p in points], [p["worst_error"] for p in points], style, color=colour)
        left.axhline(100 * data["dense_accuracy"], color="#8a929b", lw=0.9, ls=":")
        left.set(xlabel="executed share of the conditional MACs", ylabel="test accuracy (%)")
        left.set_title(f"Accuracy at every budget ({spread})")
        right.axhline(0.02, color="#8a929b", lw=0.9, ls=":")
        right.set(xlabel="budget asked for", ylabel="largest error of the executed share")
        right.set_title("What set_budget_ meets on test pictures")
        handles, labels = left.get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
        return png(drawn)
