"""From a recipe's model, kernels, masking and trainer sections to the network that is trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn

from dynaconv import _checks
from dynaconv.convert import dynamize_, masked_blocks, revert_
from dynaconv.models import create_model, load
from dynaconv.train.recipe import Recipe

_SIZED = re.compile(r"(dynconv_)?(resnet|hourglass)\d+_(cifar|scenes|mpii)")


def architecture(recipe: Recipe, classes: int, image_size: int) -> dict[str, Any]:
    """How to build the recipe's static network again: name and options for `create_model`.

    Raises:
        ValueError: fewer outputs than the data set has classes.
    """
    section = recipe.model
    outputs = section.num_classes or classes
    if outputs < classes:
        raise _checks.train_few_classes(outputs, classes)
    options = {"num_classes": outputs, **section.options}
    if _SIZED.fullmatch(section.name):
        options.setdefault("image_size", image_size)
    return {"name": section.name.removeprefix("dynconv_"), **options}


def build_network(recipe: Recipe, arch: dict[str, Any], model: nn.Module | None = None) -> nn.Module:
    """The network to train: built (or `model`), filled from `init_from`, made dynamic where the recipe says so.

    Raises:
        ValueError: masks without a budget, or a budget without masks.
    """
    input_size = (3, arch["image_size"], arch["image_size"]) if "image_size" in arch else None
    if model is None:
        model = create_model(**arch)
        if recipe.trainer.init_from is not None:
            copy_weights_(model, recipe.trainer.init_from)
        if recipe.kernels is not None:
            config = recipe.kernels.config("fresh" if recipe.trainer.init_from is None else "exact")
            dynamize_(model, config, input_size=input_size)
    if not masked_blocks(model) and (recipe.masking is not None or recipe.model.name.startswith("dynconv_")):
        dynamize_(model, recipe.masking and recipe.masking.config(), input_size=input_size)
    if masked_blocks(model) and recipe.budget is None:
        raise _checks.train_needs("a network with masks", "budget", "{target: 0.5}")
    if recipe.budget is not None and not masked_blocks(model):
        raise _checks.train_needs("budget", "masking", "{preset: default}")
    return model


def copy_weights_(model: nn.Module, path: str | Path) -> None:
    """Fill a static network with the weights of a saved one, in place; gates of the saved one are left out.

    Raises:
        FileNotFoundError: no saved network there; ValueError: the weights do not fit.
    """
    source = load(path)
    revert_(source)
    own, found = model.state_dict(), source.state_dict()
    wrong = [
        k
        for k in own.keys() | found.keys()
        if k not in own or k not in found or own[k].shape != found[k].shape
    ]
    if wrong:
        raise _checks.train_other_weights(path, wrong)
    model.load_state_dict(found)
