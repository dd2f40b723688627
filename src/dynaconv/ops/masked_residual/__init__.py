"""Masked residual block: y = act(shortcut + mask * branch(x))."""

from dynaconv.ops.masked_residual.api import masked_residual
from dynaconv.ops.masked_residual.branch import PackedBranch

__all__ = ["PackedBranch", "masked_residual"]
