"""One region for all weights of a plan, in large pages: a forward streams through them once, and small pages slow that."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

from dynaconv.engine.plan import Plan

_ALIGNMENT, _HUGE_PAGE = 64, 2 << 20
_NAMES = ("weight", "bias", "winograd")


def pool_weights(plan: Plan) -> None:
    """Move packed weights, in the order of the plan, into one region; tensors keep their values and shapes."""
    places = [(conv, name) for conv in plan.convs for name in _NAMES if getattr(conv, name) is not None]
    sizes = [_rounded(getattr(conv, name)) for conv, name in places]
    if sum(sizes) < _HUGE_PAGE:
        return
    region = _region(sum(sizes))
    at = 0
    for (conv, name), size in zip(places, sizes, strict=True):
        tensor = getattr(conv, name)
        own = region[at : at + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
        setattr(conv, name, own.copy_(tensor))
        at += size


def _rounded(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT


def _region(size: int) -> Tensor:
    """Bytes that begin at a large page, where the system has such pages."""
    pages = mmap.mmap(-1, size + 2 * _HUGE_PAGE)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    region = torch.frombuffer(pages, dtype=torch.uint8)
    return region[-region.data_ptr() % _HUGE_PAGE :]
