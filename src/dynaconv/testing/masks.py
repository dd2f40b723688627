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
from dynaconv.convert import gates, halting_stages

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


def image_mask(n: int, size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """Whole images open or closed, [n, 1, h, w]; as many open ones as fit the density, on average over seeds."""
    generator = torch.Generator().manual_seed(seed)
    order, extra = torch.randperm(n, generator=generator), float(torch.rand(1, generator=generator))
    mask = torch.zeros(n, 1, *size)
    mask[order[: int(density * n + extra)]] = 1.0
    return mask


def channel_mask(n: int, size: tuple[int, int], density: float, seed: int = 0) -> Tensor:
    """For each image `density` of the decisions open, [n, 1, h, w], as many as fit on average over images."""
    generator, count = torch.Generator().manual_seed(seed), size[0] * size[1]
    order = torch.rand(n, count, generator=generator).argsort(1).argsort(1)
    open_ = (density * count + torch.rand(n, 1, generator=generator)).floor()
    return (order < open_).float().view(n, 1, *size)


_DRAWN = {"position": blob_mask, "image": image_mask, "channels": channel_mask}


class ForcedMask:
    """Replaces one gate's decision; a forward hook of the gate, which the engine recognises and honours, too.

    Args:
        name: of the block that the gate decides for; it makes the masks of different gates differ.
        scope: of the gate: "position", "image" or "channels".
    """

    # The copy of a network that is compiled leaves such hooks behind.
    forces_masks = True

    def __init__(self, name: str, density: float, seed: int = 0, scope: str = "position") -> None:
        self.density, self.scope = density, scope
        self._salt = seed * 1_000_003 + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        self._masks: dict[tuple[int, ...], Tensor] = {}
        self._decisions: dict[tuple[int, ...], Tensor] = {}

    def mask(self, n: int, size: tuple[int, int]) -> Tensor:
        """The decision [n, 1, h, w] for `size` = (h, w), the same at every call; [n, 1, G, 1] for channels."""
        key = (n, *size)
        if key not in self._masks:
            self._masks[key] = _DRAWN[self.scope](n, size, self.density, self._salt)
        return self._masks[key]

    def decisions(self, n: int, size: tuple[int, int]) -> Tensor:
        """The same as [n, h, w] of bool."""
        key = (n, *size)
        if key not in self._decisions:
            self._decisions[key] = self.mask(n, size)[:, 0] > 0.5
        return self._decisions[key]

    def __call__(self, _gate: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        """The forward hook."""
        n, groups, *size = output.shape
        if self.scope == "channels":
            return self.mask(n, (groups, 1)).transpose(1, 2).to(output)
        return self.mask(n, tuple(size)).to(output)


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
    hooks = forced_masks(model, density, seed)
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


def forced_masks(model: nn.Module | CompiledModel, density: float, seed: int) -> dict[str, ForcedMask]:
    """By name of block. Units of one halting stage share their masks, since what has halted stays halted."""
    hooks = _by_name(model, density, seed)
    if not hooks:
        raise _checks.no_gates("force_masks")
    blob_mask(1, (2, 2), density)
    return hooks


def _by_name(model: nn.Module | CompiledModel, density: float, seed: int) -> dict[str, ForcedMask]:
    if not isinstance(model, nn.Module):
        return {g.name: ForcedMask(g.name, density, seed, g.scope) for g in model.plan.raw.gates}
    shared = {unit: first for first, stage in halting_stages(model).items() for unit in stage}
    return {
        name: ForcedMask(shared.get(name, name), density, seed, gate.scope)
        for name, gate in gates(model).items()
    }
