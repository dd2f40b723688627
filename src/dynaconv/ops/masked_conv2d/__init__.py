"""Convolution at the open positions of a mask."""

from dynaconv.ops.masked_conv2d.api import masked_conv2d

__all__ = ["masked_conv2d"]
