"""A convolution that computes only where a mask is open."""

from __future__ import annotations

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.ops import masked_conv2d


class MaskedConv2d(nn.Conv2d):
    """`nn.Conv2d` with a mask on its output grid: `forward(x, mask)` equals `mask * conv(x)`.

    In `train()` it computes densely; in `eval()` it skips closed positions. Without a mask it is `nn.Conv2d`.

    Args:
        backend: keyword-only; "auto", "cpu" or "eager".
    Raises:
        ValueError: padding other than zeros, or a mask of another size than the output.
    Source: arXiv 1912.03203, section 3.3.

    >>> import torch
    >>> conv = MaskedConv2d(3, 8, 3, padding=1).eval()
    >>> conv(torch.randn(2, 3, 5, 5), torch.zeros(2, 1, 5, 5)).abs().max().item()
    0.0
    """

    def __init__(self, *args, backend: str = "auto", **kwargs) -> None:
        super().__init__(*args, **kwargs)
        if self.padding_mode != "zeros":
            raise ValueError(f"MaskedConv2d supports padding_mode='zeros', got {self.padding_mode!r}")
        if isinstance(self.padding, str):
            raise ValueError(
                f"MaskedConv2d needs numeric padding, got {self.padding!r}; give the number of pixels"
            )
        _checks.one_of("backend", backend, ("auto", "cpu", "eager"))
        self.backend = backend

    @classmethod
    def from_conv(cls, conv: nn.Conv2d, *, backend: str = "auto") -> MaskedConv2d:
        """A masked convolution that shares the parameters of `conv`."""
        new = cls(
            conv.in_channels,
            conv.out_channels,
            conv.kernel_size,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
            conv.bias is not None,
            conv.padding_mode,
            backend=backend,
            device="meta",
        )
        new.weight, new.bias = conv.weight, conv.bias
        return new.train(conv.training)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [N, C_in, H, W], mask [N, 1, h, w] -> [N, C_out, h, w]."""
        if mask is None:
            return super().forward(x)
        backend = "eager" if self.training and self.backend == "auto" else self.backend
        return masked_conv2d(
            x,
            mask,
            self.weight,
            self.bias,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
            backend=backend,
        )
