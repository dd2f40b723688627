"""dynaconv: convolutional networks that decide, per input, where to compute and with which kernel.

Convert a network with `dynamize_`, train it under a `MacBudget`, meet budgets exactly with `calibrate_`, and run it:
in `eval()` masked blocks compute only what their masks ask for.
"""

from dynaconv import nn, ops
from dynaconv._version import __version__
from dynaconv.budget import MacBudget, calibrate_, calibrated_targets, set_budget_
from dynaconv.convert import SpatialMasking, dynamize_, gates, masked_blocks, revert_
from dynaconv.cost import Profile, collect_masks, mac_density_map, ponder_map, profile
from dynaconv.models import create_model, list_models, load, save

__all__ = [
    "MacBudget",
    "Profile",
    "SpatialMasking",
    "__version__",
    "calibrate_",
    "calibrated_targets",
    "collect_masks",
    "create_model",
    "dynamize_",
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
