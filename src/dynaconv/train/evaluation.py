"""Accuracy, loss and executed multiply-adds over a data set."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.cost import collect_masks
from dynaconv.cost.masks import MaskCollection
from dynaconv.data.tasks import CLASSIFICATION, Task, task_of


class Tally:
    """Running sums over batches: images, right answers and judged ones, loss, each block's multiply-adds."""

    def __init__(self, blocks: Iterable[str] = (), task: Task = CLASSIFICATION) -> None:
        self.blocks, self.task = list(blocks), task
        self.sums = torch.zeros(4 + 2 * len(self.blocks), dtype=torch.float64)

    def add(self, logits: Tensor, labels: Tensor, masks: MaskCollection) -> None:
        """Count one batch: outputs and labels as the task has them ([N, classes] and [N] for classes)."""
        logits = logits.float()
        loss = float(self.task.loss(logits, labels)) * len(labels)
        correct, judged = self.task.judge(logits, labels)
        costs = masks.costs()
        executed = [float(costs[name].executed_macs.sum()) if name in costs else 0.0 for name in self.blocks]
        dense = [
            float(costs[name].dense_macs * len(labels)) if name in costs else 0.0 for name in self.blocks
        ]
        self.sums += self.sums.new_tensor([len(labels), correct, judged, loss, *executed, *dense])

    def result(self) -> dict[str, Any]:
        """See `evaluate`."""
        images, correct, judged, loss = self.sums[:4].tolist()
        executed, dense = self.sums[4:].view(2, -1).tolist() if self.blocks else ([], [])
        return {
            "images": int(images),
            "metric": self.task.metric,
            "accuracy": correct / max(judged, 1),
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
        images (count), metric (what the data set judges by), accuracy (0..1, in that metric), loss (mean), ratio
        (executed over dense conditional MACs; None for a static network), densities (the same for each block).
    Raises:
        ValueError: there are no images.
    """
    if isinstance(data, Dataset):
        from dynaconv.data import make_loader

        data = make_loader(data, batch_size, shuffle=False, seed=0, drop_last=False)
    device = next(model.parameters()).device
    tally = Tally(gates(model), task_of(data))
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
