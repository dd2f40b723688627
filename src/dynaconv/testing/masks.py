"""Masks with a given density, and forcing them on a network, so that it can be tested and timed without training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates


def blob_mask(n: int, size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """Smooth random masks [n, 1, h, w] whose share of open positions is as near `density` as positions allow."""
    if not 0 <= density <= 1:
        raise ValueError(f"density must lie in [0, 1], got {density!r}")
    generator = torch.Generator().manual_seed(seed)
    h, w = size
    coarse = torch.randn(n, 1, max(2, h // 6), max(2, w // 6), generator=generator)
    field = F.interpolate(coarse, size=size, mode="bicubic") + 0.1 * torch.randn(
        n, 1, h, w, generator=generator
    )
    count = round(density * h * w)
    order = field.flatten(1).argsort(dim=1, descending=True)
    mask = torch.zeros(n, h * w).scatter_(1, order[:, :count], 1.0)
    return mask.view(n, 1, h, w)


def random_mask(n: int, size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """Independent random positions, [n, 1, h, w]; density 0 is empty, 1 is full."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(n, 1, *size, generator=generator) < density).float()


@contextmanager
def force_masks(model: nn.Module, density: float, seed: int = 0) -> Iterator[None]:
    """Replace every gate's decision by blob-like masks of the given density inside the `with` block.

    Deterministic: the same model, density, seed and input shape give the same masks. The gates still compute.

    Raises:
        ValueError: no gates, or density outside [0, 1].
    """
    found = gates(model)
    if not found:
        raise _checks.no_gates("force_masks")
    blob_mask(1, (2, 2), density)
    cache: dict[tuple, Tensor] = {}

    def hook_for(name: str):
        salt = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")

        def hook(_gate: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            key = (name, tuple(output.shape))
            if key not in cache:
                cache[key] = blob_mask(
                    output.shape[0], tuple(output.shape[2:]), density, seed * 1_000_003 + salt
                )
            return cache[key].to(output)

        return hook

    # First in line, so that collectors see the forced masks.
    handles = [g.register_forward_hook(hook_for(name), prepend=True) for name, g in found.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
