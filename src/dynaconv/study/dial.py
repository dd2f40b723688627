"""One network at every budget: trained for all of them, trained for one, and networks trained for each."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.budget import set_budget_
from dynaconv.study.budget_runs import Runs, open_study
from dynaconv.study.budget_settings import BudgetSettings

STUDY = "dial"
TITLES = {
    "dial": "one network, trained for the range",
    "one": "one network, trained for the middle",
    "special": "a network for each budget",
}


def dial(
    settings: BudgetSettings,
    budgets: Sequence[float],
    seeds: int,
    out: str | Path,
    *,
    bundle: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train networks for each budget, one for the whole range and one for its middle, and draw accuracy against MACs.

    The two single networks are calibrated at the ends of the range only; all other budgets are interpolated.

    Args:
        budgets: three or more, ascending; the first and last are the ends.
        out: a new folder, or one of the same study: finished cells stay.
    Returns:
        {"settings", "machine", "dense_accuracy", "rows" (kind, seed, budget, ratio, accuracy), "points" (means)}; also
        written to `out` as dial.json, rows.csv, dial.csv and dial.png.
    Raises:
        ValueError: budgets out of order, `out` belongs to something else or has other settings; unusable data.
    """
    from dynaconv.cost import machine_line
    from dynaconv.study.dial_figure import figure

    budgets = _checks.ascending_targets([_checks.fraction("--budgets", b) for b in budgets])
    if len(budgets) < 3:
        raise _checks.study_few_budgets(budgets)
    runs = open_study(out, STUDY, settings, bundle, progress)
    rows = [row for seed in range(seeds) for row in _seed(runs, budgets, seed)]
    points = summarise(rows)
    dense = statistics.fmean(runs.kept(f"dense-seed{seed}")["accuracy"] for seed in range(seeds))
    data = {
        "study": STUDY,
        "settings": settings.to_dict(),
        "machine": machine_line(),
        "dense_accuracy": dense,
        "points": points,
        "rows": rows,
    }
    runs.folder.write_csv("rows.csv", tuple(rows[0]), rows)
    runs.folder.write_csv("dial.csv", tuple(points[0]), points)
    runs.folder.write_json("dial.json", data)
    runs.folder.write_bytes("dial.png", figure(data))
    return data


def _seed(runs: Runs, budgets: Sequence[float], seed: int) -> list[dict[str, Any]]:
    low, high, middle = budgets[0], budgets[-1], budgets[len(budgets) // 2]
    shown = sorted({*budgets, *((a + b) / 2 for a, b in zip(budgets, budgets[1:], strict=False))})
    rows = _curve(runs, "dial", seed, {"budget": {"target": middle, "dial": [low, high]}}, shown)
    rows += _curve(runs, "one", seed, {"budget": {"target": middle}}, shown)
    for budget in budgets:
        rows += _curve(runs, "special", seed, {"budget": {"target": budget}}, [budget])
    return rows


def _curve(
    runs: Runs, kind: str, seed: int, changes: dict[str, dict[str, Any]], budgets: Sequence[float]
) -> list[dict[str, Any]]:
    # The network for the middle budget is the one that serves the others, too.
    single = kind != "dial"
    name = f"target{changes['budget']['target']:g}" if single else "dial"
    cell = f"{kind}-{name}-{'-'.join(f'{b:g}' for b in budgets)}-seed{seed}"
    kept = runs.kept(cell)
    if kept is not None:
        return kept["rows"]
    model = runs.dynamic(name, seed, changes)
    runs.calibrate(model, sorted({budgets[0], budgets[-1]}))
    rows = []
    for budget in budgets:
        set_budget_(model, budget)
        rows.append({"kind": kind, "seed": seed, "budget": budget, **runs.test(model)})
    return runs.keep(cell, {"rows": rows})["rows"]


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a kind and budget: means over seeds, the sample deviation of the accuracy, the largest budget error."""
    found = []
    for kind, budget in dict.fromkeys((row["kind"], row["budget"]) for row in rows):
        own = [row for row in rows if (row["kind"], row["budget"]) == (kind, budget)]
        accuracies = [row["accuracy"] for row in own]
        found.append(
            {
                "kind": kind,
                "budget": budget,
                "seeds": len(own),
                "ratio": statistics.fmean(row["ratio"] for row in own),
                "worst_error": max(abs(row["ratio"] - budget) for row in own),
                "accuracy_mean": statistics.fmean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(own) > 1 else None,
            }
        )
    return found


def table(data: Mapping[str, Any]) -> str:
    """The points for people."""
    rows = []
    for point in data["points"]:
        spread = "" if point["accuracy_std"] is None else f" ± {100 * point['accuracy_std']:.2f}"
        accuracy = f"{100 * point['accuracy_mean']:.2f} %{spread}"
        error = f"{point['worst_error']:.4f}"
        rows.append(
            (TITLES[point["kind"]], f"{point['budget']:.3f}", f"{point['ratio']:.4f}", error, accuracy)
        )
    header = ("network", "budget", "executed share", "largest error", "accuracy")
    dense = f"dense {100 * data['dense_accuracy']:.2f} %; test pictures, thresholds from others"
    return f"{format_table(header, rows, 'lrrrr')}\n{dense}"
