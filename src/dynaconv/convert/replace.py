"""Putting a module in the place of another one."""

from __future__ import annotations

from torch import nn

from dynaconv import _checks


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` is, in every place that holds it: a forward may go through any of them.

    Raises:
        ValueError: the name of the model itself, which has no place to be replaced in.
    """
    if not name:
        raise _checks.no_parent(type(model).__name__)
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for leaf, child in parent._modules.items():
            if child is old:
                parent._modules[leaf] = new
