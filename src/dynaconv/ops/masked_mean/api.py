"""Mean over open positions: checks, one node in graphs."""

from __future__ import annotations

from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _registry
from dynaconv.ops.masked_mean import reference
from dynaconv.ops.masked_mean.op import OP


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Average each image's feature map over the positions where its mask is open; zero where none is.

    What a squeeze-excite layer inside a masked block sees, so that skipping computes what training computed. The mask
    counts as a constant: the gradient goes to x alone.

    Args:
        x: [N, C, h, w]. mask: [N, 1, h, w] of 0 and 1.
    Returns:
        [N, C, 1, 1].
    Raises:
        ValueError: x is no [N, C, h, w], or the mask has another size or holds NaN.

    >>> import torch
    >>> masked_mean(torch.tensor([[[[1.0, 2.0, 6.0]]]]), torch.tensor([[[[1.0, 0.0, 1.0]]]])).item()
    3.5
    """
    _checks.images(x, None, "masked_mean")
    _checks.mask_for(mask, (x.shape[0], x.shape[2], x.shape[3]))
    _checks.finite_mask(mask)
    mask = mask.detach()
    return OP(x, mask) if _registry.traced(x) else reference.masked_mean(x, mask)
