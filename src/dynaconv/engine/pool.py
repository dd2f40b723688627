"""One region for all weights of a plan, in large pages: a forward streams through them once, which small pages slow."""

from __future__ import annotations

import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from dynaconv.engine.plan import Conv, Plan

_ALIGNMENT, _HUGE_PAGE = 64, 2 << 20
_NAMES = ("weight", "bias", "winograd")


def _tile_positions(conv: Conv) -> float:
    """Positions that cost as much as a tile of Winograd's, as in csrc/plan/steps_conv.cpp."""
    half = conv.winograd is not None and conv.winograd.dtype == torch.bfloat16
    return 2 + 26 / conv.in_channels + 26 / conv.out_channels if half else 2.3


def drop_unread(plan: Plan) -> None:
    """Forget direct weights that no run would read, because the convolution has no mask and Winograd's cost less."""
    readers: dict[int, list[int]] = {}
    for i, step in enumerate(plan.steps):
        for conv in step.conv:
            readers.setdefault(conv, []).append(i)
    for index, conv in enumerate(plan.convs):
        steps = [plan.steps[i] for i in readers.get(index, [])]
        if conv.winograd is None or len(steps) != 1 or steps[0].kind != "conv" or steps[0].grid >= 0:
            continue
        h, w = plan.values[steps[0].out].size
        if ((h + 1) // 2) * ((w + 1) // 2) * _tile_positions(conv) < h * w:
            conv.weight = None


def pool_weights(plan: Plan) -> None:
    """Move packed weights, in the order of the plan, into one region; tensors keep their values and shapes."""
    places = [(conv, name) for conv in plan.convs for name in _NAMES if getattr(conv, name) is not None]
    sizes = [getattr(conv, name).numel() * getattr(conv, name).element_size() for conv, name in places]
    pool = Pool(sizes)
    for (conv, name), size in zip(places, sizes, strict=True):
        tensor = getattr(conv, name)
        setattr(conv, name, pool.take(size).view(tensor.dtype).view(tensor.shape).copy_(tensor))


class Pool:
    """Bytes for tensors of these sizes, in large pages where that pays and the system has them."""

    def __init__(self, sizes: Sequence[int]) -> None:
        total, self._at = sum(map(_rounded, sizes)), 0
        if total < _HUGE_PAGE:
            self._bytes = torch.empty(total + _ALIGNMENT, dtype=torch.uint8)
            self._bytes = self._bytes[-self._bytes.data_ptr() % _ALIGNMENT :]
            return
        # What could be shared with another process lies in files of the system's, and those mostly in small pages.
        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        pages = mmap.mmap(-1, total + 2 * _HUGE_PAGE, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        region = torch.frombuffer(pages, dtype=torch.uint8)
        self._bytes = region[-region.data_ptr() % _HUGE_PAGE :]

    def take(self, size: int) -> Tensor:
        """The next `size` bytes, aligned to a line of the cache."""
        start, self._at = self._at, self._at + _rounded(size)
        return self._bytes[start : start + size]


def _rounded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
