"""Layers that several places of a network share, whose masks could not be told apart."""

from __future__ import annotations

from torch import nn


def shared_layer(model: nn.Module, name: str) -> str | None:
    """Why the block `name` cannot be masked: one of its layers is in another module, too. None where none is.

    The block itself may be in several places, and layers without parameters may be anywhere.
    """
    block = model.get_submodule(name)
    inside = set(block.modules())
    own = {
        m: path for path, m in block.named_modules() if path and next(m.parameters(False), None) is not None
    }
    for parent_name, parent in model.named_modules():
        for leaf, child in parent._modules.items():
            if child in own and parent not in inside:
                other = f"{parent_name}.{leaf}" if parent_name else leaf
                return f"its {own[child]} is also {other}; give each place its own copy"
    return None
