"""Which mask every convolution of a residual branch runs on: walking back from the block's output."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops.api import dilate


def branch_sizes(size: tuple[int, int], convs: Sequence[Geometry]) -> list[tuple[int, int]]:
    """Grid of the branch's input and of every convolution's output: len(convs) + 1 pairs (h, w)."""
    sizes = [size]
    for conv in convs:
        sizes.append(conv.output_size(sizes[-1]))
    return sizes


def branch_masks(
    mask: Tensor, sizes: Sequence[tuple[int, int]], convs: Sequence[Geometry], gradient: str = "none"
) -> list[Tensor]:
    """The mask that each convolution runs on, in order; the last one is `mask` itself.

    A k x k convolution maps the need of its output to its input by dilation, a pointwise one leaves it unchanged
    (the very same tensor, so that index lists can be shared). BasicBlock: [D, M]; Bottleneck: [D, M, M].

    Args:
        mask: [N, 1, h, w] on the block's output grid.
        sizes: from `branch_sizes`.
        gradient: of the dilation, see `dilate`.
    Source: arXiv 1912.03203, section 3.3, generalised to any chain of convolutions.
    """
    needs = [mask]
    for i in range(len(convs) - 1, 0, -1):
        conv = convs[i]
        needs.append(
            needs[-1]
            if conv.pointwise
            else dilate(
                needs[-1],
                sizes[i],
                kernel_size=conv.kernel,
                stride=conv.stride,
                padding=conv.padding,
                dilation=conv.dilation,
                gradient=gradient,
            )
        )
    return needs[::-1]
