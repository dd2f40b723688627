"""One network of the study of accuracy against multiply-adds: trained, calibrated, tested, counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynaconv import _checks
from dynaconv.budget import set_budget_
from dynaconv.budget.mac_budget import Share
from dynaconv.study.budget_runs import Runs
from dynaconv.study.curve_settings import DENSE, METHODS, Axes, CurveSettings

COUNTED_AT_ONCE = 100


@dataclass(frozen=True)
class Group:
    """Pictures that networks are compared on."""

    image_size: int | None = None
    object_share: float | None = None

    @property
    def prefix(self) -> str:
        """Of the names of files; empty for the data set as it is."""
        size = "" if self.image_size is None else f"{self.image_size}px-"
        return size if self.object_share is None else f"{size}object{self.object_share:g}-"

    @property
    def title(self) -> str:
        """For figures and lines of progress; empty for the data set as it is."""
        parts = [] if self.image_size is None else [f"{self.image_size} pixels"]
        parts += [] if self.object_share is None else [f"object {self.object_share:g} of the picture"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Cell:
    """A network and a seed: a method at a budget, or a static network of a width.

    easier: pictures with larger objects, whose networks this one starts from.
    """

    group: Group
    seed: int
    method: str
    budget: float | None = None
    width: int | None = None
    easier: Group | None = None

    @property
    def label(self) -> str:
        """Method with budget or width; also the name of its run."""
        if self.method == DENSE:
            return "static" if self.width is None else f"static-width{self.width}"
        return f"{self.method}-{self.budget:g}"

    @property
    def name(self) -> str:
        """Also the name of its file."""
        return f"{self.label}-seed{self.seed}"


def grid(settings: CurveSettings, axes: Axes) -> Iterator[Cell]:
    """All cells, seed by seed, so that an unfinished study already has whole curves; larger objects first.

    Networks for smaller objects start from those for larger ones: from scratch, an object of a hundredth of the
    picture is not found in a short training, and nothing could be compared.
    """
    for seed in range(axes.seeds):
        for size in axes.image_sizes:
            easier = None
            for share in sorted(axes.object_shares, key=lambda share: share or 1.0, reverse=True):
                group = Group(size, share)
                if DENSE in axes.methods:
                    for width in reversed(axes.static_widths(settings)):
                        yield Cell(group, seed, DENSE, width=width, easier=easier)
                for budget in reversed(axes.budgets):
                    for method in axes.methods:
                        if method != DENSE:
                            yield Cell(group, seed, method, budget=budget, easier=easier)
                easier = group


def share_of(settings: CurveSettings, method: str, bundle: Any) -> Share:
    """What a method always computes in the study's network, and what it decides about.

    Raises:
        ValueError: the method does not fit the network.
    """
    from dynaconv.train.networks import architecture, build_network

    changes = {**settings.method(method, 0.5), "trainer": {"init_from": None}}
    recipe = settings.recipe(0, "", changes)
    model = build_network(recipe, architecture(recipe, len(bundle.classes), bundle.image_size))
    return Share.of(model, (3, bundle.image_size, bundle.image_size))


def train(runs: Runs, cell: Cell) -> dict[str, Any]:
    """The row of a cell; the network stays in its run folder, calibrated.

    Returns:
        What `Cell` says, and accuracy, executed_macs (mean of one image), dense_macs of the full static network, share
        (one over the other); of dynamic networks also conditional_target, conditional_ratio, accuracy_before and
        conditional_ratio_before calibration, budget_error_before, dense_start_accuracy. `unreachable` or `diverged`
        hold a reason instead.
    """
    from dynaconv.train import TrainingDiverged

    settings: Any = runs.settings
    row = {
        "method": cell.method,
        "budget": cell.budget,
        "width": cell.width,
        "seed": cell.seed,
        "image_size": runs.bundle.image_size,
        "asked_size": cell.group.image_size,
        "object_share": cell.group.object_share,
        "run": runs.run_folder(cell.label, cell.seed).name,
        "dense_macs": dense_macs(settings, runs.bundle),
    }
    try:
        found = _static(runs, cell) if cell.method == DENSE else _dynamic(runs, cell)
    except TrainingDiverged as error:
        found = {"diverged": str(error)}
    if "executed_macs" in found:
        found["share"] = found["executed_macs"] / row["dense_macs"]
    return row | found


def _static(runs: Runs, cell: Cell) -> dict[str, Any]:
    settings: Any = runs.settings
    recipe = settings.static_recipe(cell.seed, cell.width, runs.from_easier(cell.label, cell.seed))
    model = runs.fit(recipe, runs.run_folder(cell.label, cell.seed), cell.seed, cell.label)
    return {"accuracy": runs.test(model)["accuracy"], "executed_macs": executed_macs(model, runs.bundle.test)}


def _dynamic(runs: Runs, cell: Cell) -> dict[str, Any]:
    settings: Any = runs.settings
    share = share_of(settings, cell.method, runs.bundle)
    try:
        target = round(share.conditional(float(cell.budget or 1.0)), 6)
    except ValueError as error:
        return {"unreachable": str(error)}
    changes = settings.method(cell.method, target)
    # The static network had as many epochs on the easier pictures as all that is compared here; a dense start, fewer.
    full = Cell(cell.group, cell.seed, DENSE, width=settings.width).label
    start = runs.from_easier(full, cell.seed) or runs.from_easier(DENSE, cell.seed)
    model = runs.dynamic(cell.label, cell.seed, changes, calibrate=(target,), start=start)
    set_budget_(model, None)
    before = runs.test(model)
    set_budget_(model, target)
    after = runs.test(model)
    dense = runs.kept(f"{DENSE}-seed{cell.seed}") or {}
    return {
        "accuracy": after["accuracy"],
        "executed_macs": executed_macs(model, runs.bundle.test),
        "conditional_target": target,
        "conditional_ratio": after["ratio"],
        "conditional_ratio_before": before["ratio"],
        "accuracy_before": before["accuracy"],
        "budget_error_before": before["ratio"] - target,
        "dense_start_accuracy": dense.get("accuracy"),
    }


def dense_macs(settings: CurveSettings, bundle: Any) -> int:
    """Multiply-adds of the full static network for one image."""
    from dynaconv.cost import profile
    from dynaconv.train.networks import architecture, build_network

    recipe = settings.dense_recipe(0)
    model = build_network(recipe, architecture(recipe, len(bundle.classes), bundle.image_size))
    return profile(model, torch.zeros(1, 3, bundle.image_size, bundle.image_size)).dense_macs


def executed_macs(model: nn.Module, pictures: Any) -> float:
    """Mean over pictures of what a network executes, gates included, as it is set."""
    from dynaconv.cost import profile

    total = 0.0
    for start in range(0, len(pictures), COUNTED_AT_ONCE):
        images, _ = pictures.__getitems__(list(range(start, min(start + COUNTED_AT_ONCE, len(pictures)))))
        total += float(profile(model, images).executed_macs.sum())
    return total / len(pictures)


def check_methods(settings: CurveSettings, axes: Axes, bundle: Any) -> None:
    """Raise ValueError where a method does not fit the network, before anything is trained."""
    for method in axes.methods:
        if method in METHODS:
            try:
                share_of(settings, method, bundle)
            except ValueError as error:
                raise _checks.study_method_unfit(method, settings.network, error) from None
