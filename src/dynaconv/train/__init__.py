"""Training from YAML recipes, on Lightning: budgets, checkpoints that can be resumed exactly, logs.

Recipes are read without Lightning; it is imported when training starts.
"""

from typing import Any

from dynaconv.train.errors import TrainingDiverged, TrainingInterrupted
from dynaconv.train.evaluation import evaluate
from dynaconv.train.loading import list_recipes, load_recipe, recipe_parser, recipe_path, recipe_to_yaml
from dynaconv.train.recipe import (
    BudgetSection,
    DataSection,
    MaskingSection,
    ModelSection,
    OptimSection,
    Recipe,
    TrainerSection,
)

__all__ = [
    "BudgetSection",
    "DataSection",
    "DynaconvModule",
    "FitResult",
    "MaskingSection",
    "ModelSection",
    "OptimSection",
    "Recipe",
    "TrainerSection",
    "TrainingDiverged",
    "TrainingInterrupted",
    "evaluate",
    "fit",
    "list_recipes",
    "load_recipe",
    "recipe_parser",
    "recipe_path",
    "recipe_to_yaml",
]


def __getattr__(name: str) -> Any:
    """Import what needs Lightning on first use."""
    if name in ("fit", "FitResult"):
        import importlib

        return getattr(importlib.import_module("dynaconv.train.fitting"), name)
    if name == "DynaconvModule":
        from dynaconv.train.module import DynaconvModule

        return DynaconvModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
