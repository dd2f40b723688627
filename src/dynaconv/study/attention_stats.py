"""Distribution and entropy of coefficients, per layer and per class, in one pass over the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dynaconv.study.parts import Part

BINS = 20


def entropy(values: Tensor) -> Tensor:
    """Entropy of coefficients scaled to sum to one, over its largest value log n: [..., n] -> [...] in [0, 1].

    1 is uniform, 0 is a single choice; NaN for n = 1. Coefficients of any sign count with their size.

    >>> entropy(torch.tensor([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])).tolist()
    [1.0, 0.5]
    """
    size = values.shape[-1]
    if size < 2:
        return torch.full(values.shape[:-1], math.nan, dtype=torch.float64)
    weights = values.double().abs()
    total = weights.sum(-1, keepdim=True)
    shares = torch.where(total > 0, weights / total.clamp(min=1e-30), 1 / size)
    return -torch.special.xlogy(shares, shares).sum(-1) / math.log(size)


@dataclass
class PartTally:
    """Running sums of one part of one layer.

    Args:
        part: what the coefficients are. classes: number of classes.
    """

    part: Part
    classes: int

    def __post_init__(self) -> None:
        width, kinds = self.part.groups * self.part.size, self.classes
        self.count = torch.zeros(kinds, dtype=torch.float64)
        self.sums = torch.zeros(kinds, width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)
        # entropy, its square and the largest share, by class
        self.choice = torch.zeros(3, kinds, dtype=torch.float64)
        self.histogram = torch.zeros(BINS, dtype=torch.float64)

    def add(self, routing: Tensor, labels: Tensor) -> None:
        """Count images: the layer's coefficients [B, ...], labels [B]."""
        values, labels = self.part.read(routing).detach().double().cpu(), labels.cpu()
        flat = values.flatten(1)
        self.count.index_add_(0, labels, torch.ones(len(labels), dtype=torch.float64))
        self.sums.index_add_(0, labels, flat)
        self.squares += flat.square().sum(0)
        spread = entropy(values).mean(1)
        largest = (values.abs().amax(2) / values.abs().sum(2).clamp(min=1e-30)).mean(1)
        for row, value in zip(self.choice, (spread, spread.square(), largest), strict=True):
            row.index_add_(0, labels, value)
        if self.part.top is not None:
            self.histogram += torch.histc(flat, BINS, 0, self.part.top)

    @property
    def mean(self) -> Tensor:
        """Mean coefficients over all images, [groups * size]."""
        return self.sums.sum(0) / self.count.sum()

    def result(self) -> dict[str, Any]:
        """Facts of the part over all images; shares and entropies in [0, 1], see `docs/studies.md`."""
        images, mean = self.count.sum(), self.mean
        variance = (self.squares / images - mean.square()).clamp(min=0)
        seen = self.count > 0
        class_means = self.sums[seen] / self.count[seen, None]
        between = (self.count[seen, None] * (class_means - mean).square()).sum(0) / images
        spread, square, largest = (self.choice.sum(1) / images).tolist()
        total = float(variance.sum())
        return {
            "part": self.part.name,
            "kind": self.part.kind,
            "coefficients": self.part.groups * self.part.size,
            "experts": self.part.size,
            "mean": float(mean.mean()),
            "std_over_images": float(variance.sqrt().mean()),
            "entropy": None if math.isnan(spread) else spread,
            "entropy_std": None if math.isnan(spread) else math.sqrt(max(0.0, square - spread**2)),
            "largest_share": largest,
            "class_share": min(1.0, float(between.sum()) / total) if total > 1e-12 else 0.0,
            "histogram": None if self.part.top is None else (self.histogram / self.histogram.sum()).tolist(),
            "histogram_top": self.part.top,
        }

    def by_class(self) -> list[dict[str, Any]]:
        """Entropy, largest share and (for up to 32 coefficients) mean coefficients of every class that was seen."""
        rows = []
        for label in torch.nonzero(self.count).flatten().tolist():
            spread, _, largest = (self.choice[:, label] / self.count[label]).tolist()
            means = (self.sums[label] / self.count[label]).tolist()
            rows.append(
                {
                    "class": label,
                    "images": int(self.count[label]),
                    "entropy": None if math.isnan(spread) else spread,
                    "largest_share": largest,
                    "means": means if len(means) <= 32 else None,
                }
            )
        return rows
