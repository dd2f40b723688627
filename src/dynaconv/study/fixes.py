"""What each fix of DynConv's training is worth: the default without it, and the paper's preset with it."""

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

STUDY = "fixes"
Changes = dict[str, dict[str, Any]]
# Stands for the weight decay of the other parameters.
WEIGHT_DECAY = "weight_decay"

# What the paper has instead of each fix, as keys of a recipe.
_PAPER: dict[str, Changes] = {
    "dilation": {"masking": {"dilation_gradient": "none"}},
    "temperature": {"masking": {"temperature": 1.0}},
    "open": {"masking": {"init": "paper"}},
    "decay": {"optim": {"gate_weight_decay": WEIGHT_DECAY}},
    "ramp": {"budget": {"ramp": 0.0}},
}
# What is off unless it is asked for.
_OFFERED: dict[str, Changes] = {
    "gate-lr": {"optim": {"gate_lr_multiplier": 0.1}},
    "norm": {"masking": {"norm": True}},
    "distill": {"trainer": {"distill_weight": 0.5}},
    "total": {"budget": {"scope": "total"}},
    "hold": {"budget": {"hold": True}},
}
TITLES = {
    "paper": "paper",
    "default": "default",
    "dilation": "gradient through dilation",
    "temperature": "temperature 2/3",
    "open": "open-biased start",
    "decay": "no weight decay on gates",
    "ramp": "budget ramp",
    "gate-lr": "gates at 0.1 x learning rate",
    "norm": "batch norm in the gate",
    "distill": "distillation from the dense start",
    "total": "budget of the whole network",
    "hold": "budget held by its integral",
}
VARIANTS = (
    "paper",
    "default",
    *(f"default-{fix}" for fix in _PAPER),
    *(f"default+{fix}" for fix in _OFFERED),
    *(f"paper+{fix}" for fix in _PAPER),
)


def changes_of(variant: str, settings: BudgetSettings) -> Changes:
    """Keys of a recipe that make a variant.

    >>> from dynaconv.study.budget_settings import SCENES
    >>> changes_of("default-temperature", SCENES)
    {'masking': {'temperature': 1.0}}
    """
    _checks.one_of("variant", variant, VARIANTS)
    changes = _changes_of(variant)
    if changes.get("optim", {}).get("gate_weight_decay") == WEIGHT_DECAY:
        changes = {**changes, "optim": {"gate_weight_decay": settings.weight_decay}}
    return changes


def _changes_of(variant: str) -> Changes:
    if variant.startswith("default"):
        fix = variant.removeprefix("default")[1:]
        return _PAPER.get(fix) or _OFFERED.get(fix) or {}
    fix = variant.removeprefix("paper+")
    kept = [own for name, own in _PAPER.items() if name != fix]
    merged: Changes = {"masking": {"preset": "paper"}}
    for own in kept:
        for section, keys in own.items():
            merged.setdefault(section, {}).update(keys)
    if fix in ("dilation", "temperature", "open"):
        default = {"dilation": {"dilation_gradient": "marginal"}, "temperature": {"temperature": 2 / 3}}
        merged["masking"] |= default.get(fix, {"init": "open"})
    return merged


def fixes(
    settings: BudgetSettings,
    variants: Sequence[str],
    seeds: int,
    out: str | Path,
    *,
    bundle: Any = None,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Train every variant with every seed from the same dense starts and compare them at equal executed MACs.

    Args:
        variants: names out of `VARIANTS`: paper, default, default-FIX, default+OPTION, paper+FIX.
        out: a new folder, or one of the same study: finished cells stay.
        bundle: data instead of `load_dataset(settings.data, ...)`.
    Returns:
        {"settings", "machine", "rows" (one a variant and seed), "variants" (one a variant, see `summarise`)}; also
        written to `out` as fixes.json, rows.csv and fixes.csv.
    Raises:
        ValueError: an unknown variant, `out` belongs to something else or has other settings; unusable data.
    """
    from dynaconv.cost import machine_line

    for variant in variants:
        changes_of(variant, settings)
    runs = open_study(out, STUDY, settings, bundle, progress)
    rows = [_cell(runs, variant, seed) for seed in range(seeds) for variant in variants]
    found = summarise(rows)
    dense = [runs.kept(f"dense-seed{seed}")["accuracy"] for seed in range(seeds)]
    data = {
        "study": STUDY,
        "settings": settings.to_dict(),
        "machine": machine_line(),
        "dense_accuracy": statistics.fmean(dense),
        "variants": found,
        "rows": rows,
    }
    runs.folder.write_csv("rows.csv", tuple(rows[0]), rows)
    runs.folder.write_csv("fixes.csv", tuple(found[0]), found)
    runs.folder.write_json("fixes.json", data)
    return data


def _cell(runs: Runs, variant: str, seed: int) -> dict[str, Any]:
    name = f"{variant}-seed{seed}"
    kept = runs.kept(name)
    if kept is not None:
        return kept
    changes = changes_of(variant, runs.settings)
    if "distill_weight" in changes.get("trainer", {}):
        changes = {**changes, "trainer": {**changes["trainer"], "teacher": runs.dense(seed)}}
    if changes.get("budget", {}).get("scope") == "total":
        changes = {"budget": {"scope": "total", "target": _total_target(runs, seed)}}
    model = runs.dynamic(variant, seed, changes)
    target = runs.settings.target
    set_budget_(model, None)
    before = runs.test(model)
    runs.calibrate(model, (target,))
    after = runs.test(model)
    row = {
        "variant": variant,
        "seed": seed,
        "ratio_before": before["ratio"],
        "accuracy_before": before["accuracy"],
    }
    return runs.keep(name, {**row, "ratio": after["ratio"], "accuracy": after["accuracy"]})


def _total_target(runs: Runs, seed: int) -> float:
    """The share of the whole network that is the study's share of the conditional MACs."""
    from dynaconv import dynamize_, load
    from dynaconv.budget.mac_budget import Share
    from dynaconv.convert import SpatialMasking

    model = load(runs.dense(seed))
    dynamize_(model, SpatialMasking())
    share = Share.of(model, None)
    return (runs.settings.target * share.possible + share.fixed) / share.static


def summarise(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a variant: means over seeds (spreads are sample deviations, None for one seed).

    accuracy: at the target, calibrated. error_before: executed share minus target as training left it, absolute.
    gain: accuracy minus that of its base with the same seeds.
    """
    by = {(row["variant"], row["seed"]): row for row in rows}
    found = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        own = [row for row in rows if row["variant"] == variant]
        base = "paper" if variant.startswith("paper") else "default"
        gains = [r["accuracy"] - by[base, r["seed"]]["accuracy"] for r in own if (base, r["seed"]) in by]
        accuracies = [row["accuracy"] for row in own]
        found.append(
            {
                "variant": variant,
                "seeds": len(own),
                "accuracy_mean": statistics.fmean(accuracies),
                "accuracy_std": statistics.stdev(accuracies) if len(own) > 1 else None,
                "gain": statistics.fmean(gains) if gains and variant != base else None,
                "ratio_before": statistics.fmean(row["ratio_before"] for row in own),
                "accuracy_before": statistics.fmean(row["accuracy_before"] for row in own),
                "ratio": statistics.fmean(row["ratio"] for row in own),
            }
        )
    return found


def table(data: Mapping[str, Any]) -> str:
    """The summary for people."""
    target = data["settings"]["target"]
    header = ("variant", "seeds", "accuracy", "gain", "share before", "error before", "share after")
    rows = []
    for row in data["variants"]:
        spread = "" if row["accuracy_std"] is None else f" ± {100 * row['accuracy_std']:.2f}"
        rows.append(
            (
                title(row["variant"]),
                str(row["seeds"]),
                f"{100 * row['accuracy_mean']:.2f} %{spread}",
                "" if row["gain"] is None else f"{100 * row['gain']:+.2f}",
                f"{row['ratio_before']:.3f}",
                f"{row['ratio_before'] - target:+.3f}",
                f"{row['ratio']:.3f}",
            )
        )
    dense = f"dense {100 * data['dense_accuracy']:.2f} %"
    note = f"shares of the conditional MACs on test pictures, target {target:g}"
    return f"{format_table(header, rows, 'lrrrrrr')}\n{dense}; {note}"


def title(variant: str) -> str:
    """What a variant is, in words."""
    for sign, word in (("+", "with"), ("-", "without")):
        base, found, fix = variant.partition(sign)
        if found:
            return f"{base} {word} {TITLES[fix]}"
    return TITLES[variant]
