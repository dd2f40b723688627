"""How alike the rows of a matrix are: Pearson correlation, histogram and buckets (DyNet's study, arXiv 2004.10694)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynaconv import _checks

BUCKETS = ("S", "M", "W", "N")
# The interval in which the paper finds most of the dynamic network's correlations.
INSIDE = (-0.1, 0.2)
# A row whose variance is below this share of its mean square is constant up to rounding.
_CONSTANT = 1e-12


@dataclass(frozen=True)
class Thresholds:
    """|r| from which a correlation is strong (S), middle (M) or weak (W); below the last it is none (N).

    Raises:
        ValueError: not 1 >= strong > middle > weak > 0.
    """

    strong: float = 0.5
    middle: float = 0.3
    weak: float = 0.1

    def __post_init__(self) -> None:
        if not 1 >= self.strong > self.middle > self.weak > 0:
            raise _checks.study_thresholds((self.strong, self.middle, self.weak))


@dataclass
class CorrelationResult:
    """What a tally found; shares are of the pairs of one image, averaged over the images.

    edges [bins + 1], histogram [bins]; buckets: share of S, M, W, N; inside: share in [-0.1, 0.2]; mean, mean_abs of r;
    images (a static kernel counts as one), skipped (images with fewer than two rows that vary); rows of one image,
    dropped: rows of zero variance, mean over the images.
    """

    edges: list[float]
    histogram: list[float]
    buckets: dict[str, float]
    inside: float
    mean: float
    mean_abs: float
    images: int
    skipped: int
    rows: int
    dropped: float

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)


def pearson(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Correlation of every pair of rows of every image.

    Args:
        rows: [N, R, P]: R rows (channels, filters) of P values, for each of N images.
    Returns:
        r [N, R, R] float64 in [-1, 1] (0 where a row is constant), varies [N, R] bool.

    >>> r, varies = pearson(torch.tensor([[[0.0, 1.0, 2.0], [2.0, 1.0, 0.0], [5.0, 5.0, 5.0]]]))
    >>> round(float(r[0, 0, 1]), 6), varies.tolist()
    (-1.0, [[True, True, False]])
    """
    values = rows.double()
    centred = values - values.mean(2, keepdim=True)
    variance = centred.square().mean(2)
    varies = variance > _CONSTANT * values.square().mean(2)
    scale = torch.where(varies, centred.norm(dim=2), 1.0)
    unit = torch.where(varies[:, :, None], centred / scale[:, :, None], 0.0)
    return (unit @ unit.transpose(1, 2)).clamp(-1, 1), varies


@dataclass
class CorrelationTally:
    """Adds up images one by one, because dynamic kernels differ per image and pooling images would mix kernels.

    Args:
        thresholds: of the buckets. bins: of the histogram over [-1, 1].
    """

    thresholds: Thresholds = field(default_factory=Thresholds)
    bins: int = 40

    def __post_init__(self) -> None:
        _checks.train_at_least("bins", self.bins, 2)
        self.histogram = torch.zeros(self.bins, dtype=torch.float64)
        # S, M, W, N, inside, mean, mean of |r|, dropped rows
        self.sums = torch.zeros(8, dtype=torch.float64)
        self.images = self.skipped = self.rows = 0

    def add(self, rows: Tensor) -> None:
        """Count images: rows [N, R, P]."""
        correlation, varies = pearson(rows)
        self.rows = rows.shape[1]
        upper = torch.ones(self.rows, self.rows, dtype=torch.bool, device=rows.device).triu(1)
        pairs = upper & varies[:, :, None] & varies[:, None, :]
        for image in range(len(rows)):
            r = correlation[image][pairs[image]].cpu()
            if not len(r):
                self.skipped += 1
                continue
            self.images += 1
            self.histogram += torch.histc(r, self.bins, -1, 1) / len(r)
            self.sums += torch.tensor([*self._shares(r), float((~varies[image]).sum())], dtype=torch.float64)

    def _shares(self, r: Tensor) -> list[float]:
        size, t = r.abs(), self.thresholds
        above = [float((size >= level).double().mean()) for level in (t.strong, t.middle, t.weak)]
        buckets = [above[0], above[1] - above[0], above[2] - above[1], 1 - above[2]]
        inside = float(((r >= INSIDE[0]) & (r <= INSIDE[1])).double().mean())
        return [*buckets, inside, float(r.mean()), float(size.mean())]

    def result(self) -> CorrelationResult:
        """Means over the images.

        Raises:
            ValueError: no image had two rows that vary.
        """
        if not self.images:
            raise _checks.study_nothing_varies(self.rows, self.skipped)
        means = (self.sums / self.images).tolist()
        return CorrelationResult(
            edges=torch.linspace(-1, 1, self.bins + 1, dtype=torch.float64).tolist(),
            histogram=(self.histogram / self.images).tolist(),
            buckets=dict(zip(BUCKETS, means[:4], strict=True)),
            inside=means[4],
            mean=means[5],
            mean_abs=means[6],
            images=self.images,
            skipped=self.skipped,
            rows=self.rows,
            dropped=means[7],
        )
