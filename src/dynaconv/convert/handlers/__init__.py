"""One handler for each kind of block: it reads a block's anatomy or says why it cannot.

To support another kind of block, write `handler(block) -> Anatomy | Refusal | None` and add it to `HANDLERS`.
"""

from collections.abc import Callable

from torch import nn

from dynaconv.convert.handlers._common import Refusal, Verdict
from dynaconv.convert.handlers.inverted_residual import (
    timm_depthwise_separable,
    timm_inverted_residual,
    torchvision_inverted_residual,
)
from dynaconv.convert.handlers.residual import residual_block
from dynaconv.nn.routed_block import RoutedBlock

HANDLERS: list[Callable[[nn.Module], Verdict]] = [
    timm_inverted_residual,
    timm_depthwise_separable,
    torchvision_inverted_residual,
    residual_block,
]


def recognise(block: nn.Module) -> Verdict:
    """First verdict of the handlers; None when the module is no block that any of them knows."""
    if isinstance(block, RoutedBlock):
        block = block.block
    return next((v for v in (handler(block) for handler in HANDLERS) if v is not None), None)


__all__ = ["HANDLERS", "Refusal", "Verdict", "recognise"]
