"""Accuracy, loss and executed multiply-adds over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.cost import collect_masks
from dynaconv.cost.masks import MaskCollection


class Tally:
    """Running sums over batches: images, correct answers, loss, and each block's executed and dense multiply-adds."""

    def __init__(self, blocks: Iterable[str] = ()) -> None:
        self.blocks = list(blocks)
        self.sums = torch.zeros(3 + 2 * len(self.blocks), dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor, masks: MaskCollection) -> None:
        """Count one batch: logits [N, classes], labels [N]."""
        logits = logits.float()
        loss = F.cross_entropy(logits, labels, reduction="sum")
        correct = (logits.argmax(1) == labels).sum()
        costs = masks.costs()
        executed = [float(costs[name].executed_macs.sum()) if name in costs else 0.0 for name in self.blocks]
        dense = [
            float(costs[name].dense_macs * len(labels)) if name in costs else 0.0 for name in self.blocks
        ]
        self.sums += self.sums.new_tensor([len(labels), float(correct), float(loss), *executed, *dense])

    def result(self) -> dict[str, Any]:
        """See `evaluate`."""
        images, correct, loss = self.sums[:3].tolist()
        executed, dense = self.sums[3:].view(2, -1).tolist() if self.blocks else ([], [])
        return {
            "images": int(images),
            "accuracy": correct / images,
            "loss": loss / images,
            "ratio": sum(executed) / sum(dense) if sum(dense) else None,
            "densities": {n: e / d for n, e, d in zip(self.blocks, executed, dense, strict=True) if d},
        }


@torch.inference_mode()
def evaluate(model: nn.Module, data: Dataset | Iterable[Any], *, batch_size: int = 64) -> dict[str, Any]:
    """Evaluate a network as it is set (see `dc.set_budget_`), in evaluation mode, skipping what its masks skip.

    Args:
        data: a data set of `dynaconv.data`, or anything that yields (images [N, C, H, W], labels [N]).
    Returns:
        images (count), accuracy (0..1), loss (mean cross-entropy), ratio (executed over dense conditional MACs; None
        for a static network), densities (the same for each block).
    Raises:
        ValueError: there are no images.
    """
    if isinstance(data, Dataset):
        from dynaconv.data import make_loader

        data = make_loader(data, batch_size, shuffle=False, seed=0, drop_last=False)
    device = next(model.parameters()).device
    tally = Tally(gates(model))
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        for images, labels in data:
            images = images.to(device, memory_format=torch.channels_last)
            with collect_masks(model) as masks:
                logits = model(images)
            tally.add(logits, labels.to(device), masks)
    finally:
        for module, mode in modes.items():
            module.training = mode
    if tally.sums[0] == 0:
        raise _checks.train_no_images()
    return tally.result()
