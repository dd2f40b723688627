"""What a data set asks of a network: the loss, and how answers are judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from dynaconv import _checks


class Classification:
    """One class a picture: cross-entropy, accuracy. Labels are int64 [N]."""

    metric: ClassVar[str] = "accuracy"

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean cross-entropy; outputs [N, classes]."""
        return F.cross_entropy(outputs, labels, label_smoothing=label_smoothing)

    def distance(self, outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """T^2 * KL(teacher, student), the mean over the batch (arXiv 1503.02531)."""
        log_p, log_q = F.log_softmax(outputs / temperature, 1), F.log_softmax(taught / temperature, 1)
        return temperature**2 * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)

    def judge(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """Right answers, and how many there could be."""
        return float((outputs.argmax(1) == labels).sum()), len(labels)


@dataclass(frozen=True)
class Keypoints:
    """Several points a picture, as heat-maps: mean squared error to Gaussians, percentage of correct keypoints.

    Labels are float32 [N, K, 4]: x and y in pixels of the picture (the centre of the first pixel is 0), 1 where the
    point is known, and the length that errors are measured in. A keypoint is right when it is off by at most `alpha`
    of that length.

    Args:
        alpha: 0.5 with the head's length is PCKh@0.5 (arXiv 1603.06937), 0.2 with the object's side PCK@0.2.
        sigma: of the Gaussians, in pixels of the heat-map. length: the name of the unit, for the metric's name.
    Raises:
        ValueError: alpha or sigma not positive.

    >>> Keypoints(alpha=0.2).metric
    'PCK@0.2'
    """

    alpha: float = 0.2
    sigma: float = 1.0
    length: str = ""

    def __post_init__(self) -> None:
        _checks.positive("alpha", self.alpha)
        _checks.positive("sigma", self.sigma)

    @property
    def metric(self) -> str:
        """PCK@0.2, or with the head's length PCKh@0.5."""
        return f"PCK{self.length}@{self.alpha:g}"

    def loss(self, outputs: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Mean squared error over all stacks, known keypoints and pixels; outputs [N, S, K, h, w].

        Raises:
            ValueError: label smoothing, which heat-maps do not have; outputs of another shape.
        """
        if label_smoothing:
            raise ValueError("label_smoothing is for classes; leave it at 0 for keypoints")
        self._check(outputs, labels)
        known = labels[:, None, :, 2, None, None]
        error = (outputs - self.heat_maps(labels, _grid(outputs))[:, None]).square() * known
        return error.sum() / (known.sum() * outputs.shape[1] * outputs.shape[3] * outputs.shape[4]).clamp(
            min=1
        )

    def distance(self, outputs: Tensor, taught: Tensor, temperature: float) -> Tensor:
        """Mean squared difference of heat-maps; the temperature has no part in it."""
        return F.mse_loss(outputs[:, -1], taught[:, -1])

    def judge(self, outputs: Tensor, labels: Tensor) -> tuple[float, int]:
        """Right keypoints of the last stack, and how many are known."""
        self._check(outputs, labels)
        known = labels[:, :, 2] > 0
        apart = (self.points(outputs[:, -1]) - labels[:, :, :2].double()).norm(dim=2)
        right = (apart <= self.alpha * labels[:, :, 3]) & known
        return float(right.sum()), int(known.sum())

    def heat_maps(self, labels: Tensor, grid: tuple[int, int], stride: int = 4) -> Tensor:
        """Gaussians of height 1 around the keypoints, [N, K, h, w], zero beyond 3 sigma."""
        centre = (labels[:, :, :2] + 0.5) / stride - 0.5
        ys, xs = (torch.arange(n, device=labels.device, dtype=labels.dtype) for n in grid)
        square = (xs - centre[:, :, 0, None]).square()[:, :, None, :]
        square = square + (ys - centre[:, :, 1, None]).square()[:, :, :, None]
        return torch.exp(-square / (2 * self.sigma**2)) * (square <= (3 * self.sigma) ** 2)

    def points(self, maps: Tensor, stride: int = 4) -> Tensor:
        """Where heat-maps [N, K, h, w] are highest, a quarter pixel towards the higher side: [N, K, 2] as x, y."""
        n, k, h, w = maps.shape
        best = maps.flatten(2).argmax(2)
        x, y = best % w, best // w

        def towards(dx: int, dy: int) -> Tensor:
            def at(sign: int) -> Tensor:
                column, row = (x + sign * dx).clamp(0, w - 1), (y + sign * dy).clamp(0, h - 1)
                return maps.flatten(2).gather(2, (row * w + column)[..., None])[..., 0]

            inside = (x > 0) & (x < w - 1) if dx else (y > 0) & (y < h - 1)
            return 0.25 * torch.sign(at(1) - at(-1)) * inside

        centre = torch.stack((x + towards(1, 0), y + towards(0, 1)), 2).double()
        return (centre + 0.5) * stride - 0.5

    def _check(self, outputs: Tensor, labels: Tensor) -> None:
        if outputs.dim() != 5 or outputs.shape[2] != labels.shape[1]:
            raise ValueError(
                f"keypoints need heat-maps [N, stacks, {labels.shape[1]}, h, w], got {list(outputs.shape)}; "
                "use a network such as hourglass1_scenes"
            )


def _grid(outputs: Tensor) -> tuple[int, int]:
    return outputs.shape[3], outputs.shape[4]


Task = Classification | Keypoints
CLASSIFICATION = Classification()


def task_of(data: Any) -> Task:
    """What a data set, a subset of one, or a loader over either asks for; classification where it does not say."""
    while not hasattr(data, "task") and hasattr(data, "dataset"):
        data = data.dataset
    return getattr(data, "task", CLASSIFICATION)


def known_points(xy: Tensor, lengths: Tensor | Sequence[float], known: Tensor | None = None) -> Tensor:
    """Labels [N, K, 4] from points [N, K, 2], one length a picture [N], and which are known [N, K] (None: all)."""
    n, k = xy.shape[:2]
    lengths = torch.as_tensor(lengths, dtype=torch.float32)[:, None].expand(n, k)
    known = torch.ones(n, k) if known is None else known.float()
    return torch.cat((xy.float(), known[..., None], lengths[..., None]), 2)
