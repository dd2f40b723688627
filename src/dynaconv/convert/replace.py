"""Putting a module in the place of another one."""

from __future__ import annotations

from torch import nn

from dynaconv import _checks


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` is.

    Raises:
        ValueError: the name of the model itself, which has no place to be replaced in.
    """
    if not name:
        raise _checks.no_parent(type(model).__name__)
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = new
