"""Masks with a given density, and forcing them on a network, so that it can be tested and timed without training."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates

if TYPE_CHECKING:
    from dynaconv.engine import CompiledModel


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


class ForcedMask:
    """Replaces one gate's decision; a forward hook of the gate, which the engine recognises and honours, too.

    Args:
        name: of the block that the gate decides for; it makes the masks of different gates differ.
    """

    # The copy of a network that is compiled leaves such hooks behind.
    forces_masks = True

    def __init__(self, name: str, density: float, seed: int = 0) -> None:
        self.density = density
        self._salt = seed * 1_000_003 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._decisions: dict[tuple[int, ...], Tensor] = {}

    def mask(self, n: int, size: tuple[int, int]) -> Tensor:
        """The decision [n, 1, h, w] for `size` = (h, w), the same at every call."""
        key = (n, *size)
        if key not in self._masks:
            self._masks[key] = blob_mask(n, size, self.density, self._salt)
        return self._masks[key]

    def decisions(self, n: int, size: tuple[int, int]) -> Tensor:
        """The same as [n, h, w] of bool."""
        key = (n, *size)
        if key not in self._decisions:
            self._decisions[key] = self.mask(n, size)[:, 0] > 0.5
        return self._decisions[key]

    def __call__(self, _gate: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """The forward hook."""
        return self.mask(output.shape[0], tuple(output.shape[2:])).to(output)


@contextmanager
def force_masks(model: nn.Module | CompiledModel, density: float, seed: int = 0) -> Iterator[None]:
    """Replace every gate's decision by blob-like masks of the given density inside the `with` block.

    Deterministic: the same names of blocks, density, seed and input shape give the same masks, in a network and in
    what `dynaconv.compile` makes of it. The gates still compute. A compiled model follows the network that it was
    compiled from while that network is forced, and can be forced by itself.

    Raises:
        ValueError: no gates, or density outside [0, 1].
    """
    compiled = None if isinstance(model, nn.Module) else model
    names = list(gates(model)) if compiled is None else compiled.gates
    if not names:
        raise _checks.no_gates("force_masks")
    blob_mask(1, (2, 2), density)
    hooks = {name: ForcedMask(name, density, seed) for name in names}
    if compiled is not None:
        before = compiled.force(hooks)
        try:
            yield
        finally:
            compiled.force(before)
        return
    # First in line, so that collectors see the forced masks.
    handles = [g.register_forward_hook(hooks[name], prepend=True) for name, g in gates(model).items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
