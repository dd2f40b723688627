"""Mean over the open positions of each image."""

from dynaconv.ops.masked_mean.api import masked_mean

__all__ = ["masked_mean"]
