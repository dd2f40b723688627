"""Masked residual block: y = act(shortcut + mask * branch(x))."""

from dynaconv.ops.masked_residual.api import PackedBranch, masked_residual

__all__ = ["PackedBranch", "masked_residual"]
