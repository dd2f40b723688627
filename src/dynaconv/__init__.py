"""dynaconv: convolutional networks that decide, per input, where to compute and with which kernel.

Convert a network with `dynamize_`, train it under a `MacBudget`, meet budgets exactly with `calibrate_`, and run it:
in `eval()` masked blocks compute only what their masks ask for, and dynamic layers use one kernel for each image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from dynaconv import nn, ops
from dynaconv._version import __version__
from dynaconv.budget import MacBudget, calibrate_, calibrated_targets, set_budget_
from dynaconv.convert import (
    ChannelGate,
    CondConv,
    DCDConv,
    DYConv,
    DyNetConv,
    Halting,
    LayerGate,
    Narrow,
    ODConv,
    RandomMasking,
    SpatialMasking,
    WeightNetConv,
    dynamic_layers,
    dynamize_,
    fuse_,
    gates,
    masked_blocks,
    revert_,
)
from dynaconv.cost import Profile, collect_masks, mac_density_map, ponder_map, profile
from dynaconv.models import create_model, list_models, load, save

if TYPE_CHECKING:
    from dynaconv import engine, export
    from dynaconv.engine import compile

__all__ = [
    "ChannelGate",
    "CondConv",
    "DCDConv",
    "DYConv",
    "DyNetConv",
    "Halting",
    "LayerGate",
    "MacBudget",
    "Narrow",
    "ODConv",
    "Profile",
    "RandomMasking",
    "SpatialMasking",
    "WeightNetConv",
    "__version__",
    "calibrate_",
    "calibrated_targets",
    "collect_masks",
    "compile",
    "create_model",
    "dynamic_layers",
    "dynamize_",
    "engine",
    "export",
    "fuse_",
    "gates",
    "list_models",
    "load",
    "mac_density_map",
    "masked_blocks",
    "nn",
    "ops",
    "ponder_map",
    "profile",
    "revert_",
    "save",
    "set_budget_",
]


def __getattr__(name: str) -> Any:
    """`compile`, `engine` and `export` load on first use: they need torch.export."""
    if name not in ("compile", "engine", "export"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    if name == "export":
        return importlib.import_module("dynaconv.export")
    engine = importlib.import_module("dynaconv.engine")
    return engine if name == "engine" else engine.compile
