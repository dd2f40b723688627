"""dynaconv: convolutional networks that decide, per input, where to compute and with which kernel.

Convert a network with `dynamize_`, train it under a `MacBudget`, meet budgets exactly with `calibrate_`, and run it:
in `eval()` masked blocks compute only what their masks ask for, and dynamic layers use one kernel for each image.
"""

from dynaconv import nn, ops
from dynaconv._version import __version__
from dynaconv.budget import MacBudget, calibrate_, calibrated_targets, set_budget_
from dynaconv.convert import (
    CondConv,
    DCDConv,
    DYConv,
    DyNetConv,
    ODConv,
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

__all__ = [
    "CondConv",
    "DCDConv",
    "DYConv",
    "DyNetConv",
    "MacBudget",
    "ODConv",
    "Profile",
    "SpatialMasking",
    "WeightNetConv",
    "__version__",
    "calibrate_",
    "calibrated_targets",
    "collect_masks",
    "create_model",
    "dynamic_layers",
    "dynamize_",
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
