"""Gates over groups of channels: one decision for each group and image, or the same for every image.

Source: LAUDNet's channel mode, arXiv 2308.15949, section 3; with the mask behind the activation, so that skipping a
channel gives the very numbers of multiplying it by zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.gate import Gate


class ChannelUnit(Gate):
    """Scores for groups of hidden channels from the average of the block's input.

    `z = Linear(hidden -> G)(ReLU(Linear(C -> hidden)(mean(x))))`. LAUDNet has two scores a group; only their difference
    decides, which is what this layer gives.

    Args:
        in_channels: C of the block's input.
        groups: G, decisions for each image.
        hidden: width between; None takes max(G // 16, 16).
        temperature: of the straight-through gradient.
        open_bias: logit at the start; 2 means 88 % open.
    Shapes:
        x [N, C, H, W] -> mask [N, G, 1, 1].

    >>> ChannelUnit(16, groups=4).eval()(torch.randn(2, 16, 9, 8)).flatten(1)
    tensor([[1., 1., 1., 1.],
            [1., 1., 1., 1.]])
    """

    scope = "channels"

    def __init__(
        self,
        in_channels: int,
        *,
        groups: int,
        hidden: int | None = None,
        temperature: float = 1.0,
        open_bias: float = 2.0,
    ) -> None:
        super().__init__(temperature)
        _checks.positive("in_channels", in_channels)
        _checks.count("groups", groups)
        self.in_channels, self.groups = in_channels, groups
        self.hidden = max(groups // 16, 16) if hidden is None else hidden
        _checks.count("hidden", self.hidden)
        self.squeeze = nn.Linear(in_channels, self.hidden)
        self.scores = nn.Linear(self.hidden, groups)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.constant_(self.scores.bias, open_bias)

    def logits(self, x: Tensor) -> Tensor:
        """[N, G, 1, 1]; higher means rather compute."""
        _checks.images(x, self.in_channels, f"ChannelUnit({self.in_channels})")
        return self.scores(F.relu(self.squeeze(x.mean((2, 3)))))[:, :, None, None]

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image, biases included, whatever its size."""
        return (self.in_channels + 1) * self.hidden + (self.hidden + 1) * self.groups

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{self.in_channels}, groups={self.groups}, hidden={self.hidden}"


class WidthUnit(Gate):
    """The same channels for every image: a narrower network, as a control.

    The channels have a fixed order, the first ones stay longest; the threshold says how many.

    Args:
        groups: G, channels or groups of them.
        keep: share of the groups that stay open at threshold 0.
        phase: 0..1, moves the thresholds at which this block's groups close, so that blocks close theirs in turn.
    Shapes:
        x [N, C, H, W] -> mask [N, G, 1, 1].

    >>> WidthUnit(4, keep=0.5)(torch.randn(1, 16, 9, 8)).flatten().tolist()
    [1.0, 1.0, 0.0, 0.0]
    """

    scope = "channels"

    def __init__(self, groups: int, *, keep: float = 1.0, phase: float = 0.5) -> None:
        super().__init__()
        _checks.count("groups", groups)
        _checks.fraction("keep", keep)
        self.groups, self.keep, self.phase = groups, keep, phase
        order = (torch.arange(groups, dtype=torch.float64) + min(max(phase, 0.01), 0.99)) / groups
        # With keep = 1 the last channel's score lies at 0, so that it is open, just.
        offset = math.log(keep / (1 - keep)) if keep < 1 else 1e-6 - float(torch.logit(1 - order[-1]))
        scores = (torch.logit(1 - order) + offset).float()
        self.register_buffer("scores", scores, persistent=False)

    def logits(self, x: Tensor) -> Tensor:
        """[N, G, 1, 1], falling with the channel."""
        return self.scores.view(1, -1, 1, 1).expand(x.shape[0], -1, 1, 1)

    def decide(self, logits: Tensor, noise: Tensor | None = None) -> Tensor:
        """Without noise, in training as in evaluation."""
        return (logits >= self.threshold).to(logits.dtype)

    def macs(self, size: tuple[int, int]) -> int:
        """Deciding costs nothing."""
        return 0

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"groups={self.groups}, keep={self.keep:g}"
