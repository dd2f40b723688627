"""ConvNet-AIG's gate: one decision for a whole block and image.

Source: "Convolutional Networks with Adaptive Inference Graphs", arXiv 1711.11503, section 3.2 and the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.gate import Gate
from dynaconv.ops.mask_ops import upsample_mask


class LayerUnit(Gate):
    """Per-image gate: two scores from the average of the block's input; the block runs where "open" wins.

    `v = ReLU(BN(Linear(C -> hidden)(mean(x))))`, `(closed, open) = Linear(hidden -> 2)(v)`. The last layer starts with
    weights near zero and biases (0.1, 2), so that 87 % of the images run the block at first.

    Args:
        in_channels: C of the block's input.
        stride: the block's stride; the mask lies on the block's output grid.
        hidden: width of the layer between.
        temperature: of the straight-through gradient (1 in the paper).
    Shapes:
        x [N, C, H, W] -> mask [N, 1, h, w] with h = (H - 1) // stride + 1, constant within an image.

    >>> LayerUnit(16, stride=2).eval()(torch.randn(2, 16, 9, 8)).shape
    torch.Size([2, 1, 5, 4])
    """

    scope = "image"

    def __init__(
        self, in_channels: int, *, stride: int = 1, hidden: int = 16, temperature: float = 1.0
    ) -> None:
        super().__init__(temperature)
        _checks.positive("in_channels", in_channels)
        _checks.count("hidden", hidden)
        self.in_channels, self.stride, self.hidden = in_channels, stride, hidden
        self.squeeze = nn.Linear(in_channels, hidden)
        self.norm = nn.BatchNorm1d(hidden)
        self.scores = nn.Linear(hidden, 2)
        self.register_buffer("difference", torch.tensor([[-1.0, 1.0]]), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialise as the released code does."""
        self.squeeze.reset_parameters()
        nn.init.normal_(self.scores.weight, std=0.001)
        with torch.no_grad():
            self.scores.bias.copy_(torch.tensor([0.1, 2.0]))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The block's output grid (h, w) for an input grid (H, W)."""
        return (size[0] - 1) // self.stride + 1, (size[1] - 1) // self.stride + 1

    def logits(self, x: Tensor) -> Tensor:
        """Score of "open" minus score of "closed", [N, 1, 1, 1]."""
        _checks.images(x, self.in_channels, f"LayerUnit({self.in_channels})")
        v = F.relu(self.norm(self.squeeze(x.mean((2, 3)))))
        # As a product, so that exporters see a layer of constants.
        return F.linear(self.scores(v), self.difference.to(v.dtype))[:, :, None, None]

    def forward(self, x: Tensor) -> Tensor:
        """Mask [N, 1, h, w] of 0 and 1, constant within an image."""
        h, w = self.grid((x.shape[2], x.shape[3]))
        return upsample_mask(self.decide(self.logits(x)), max(h, w), (h, w))

    def macs(self, size: tuple[int, int]) -> int:
        """Multiply-adds for one image: C * hidden + hidden + 2 * hidden + 2, whatever its size."""
        return self.squeeze.weight.numel() + self.hidden + self.scores.weight.numel() + 2

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"{self.in_channels}, stride={self.stride}, hidden={self.hidden}"
