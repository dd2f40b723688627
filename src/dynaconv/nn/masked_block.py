"""A residual block that computes its branch only where its gate asks for it.

Source: DynConv, arXiv 1912.03203, equation 1 and section 3.3; section 1.4 of the block table in docs/concepts.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn._fold import activation_name, fold_conv
from dynaconv.nn.gate import Gate
from dynaconv.ops import ACTIVATIONS, ConvSpec, PackedBranch, masked_residual
from dynaconv.ops.masked_residual.cpu import BREAK_EVEN


@dataclass(frozen=True)
class Step:
    """One convolution of a residual branch with what follows it, as attribute paths inside the block."""

    conv: str
    norm: str | None = None
    act: str | None = None


@dataclass(frozen=True)
class Anatomy:
    """How a block computes: act(shortcut(x) + branch(x)).

    kind names the block in reports; steps are the branch in order; shortcut is the path of the projection or None
    for identity; act is the path of the final activation or None.
    """

    kind: str
    steps: tuple[Step, ...]
    shortcut: str | None = None
    act: str | None = None


class MaskedBlock(nn.Module):
    """Wraps a residual block, unchanged, as `block`, and decides with `gate` where to run its branch.

    `y = act(shortcut(x) + M * branch(x))`. In `train()` the branch is computed densely (batch norm sees every
    position) and multiplied by M once; in `eval()` only the positions that M needs are computed.

    Args:
        block: the original block; it keeps its parameters and names under `block.`.
        anatomy: where its convolutions, norms, activations and shortcut are.
        gate: decides the mask from the block's input; M is [N, 1, h, w] on the block's output grid.
        config: what `dynamize_` was asked for, kept so that the network can be saved and rebuilt.
        dilation_gradient: "none" (paper), "marginal" or "max": gradient of the budget through dilated masks.
        backend: "auto", "cpu" or "eager"; an explicit choice never falls back.
    """

    def __init__(
        self,
        block: nn.Module,
        anatomy: Anatomy,
        gate: Gate,
        *,
        config: object = None,
        dilation_gradient: str = "none",
        backend: str = "auto",
        break_even: float = BREAK_EVEN,
    ) -> None:
        super().__init__()
        self.block = block
        self.gate = gate
        self.anatomy = anatomy
        self.config = config
        self.dilation_gradient = dilation_gradient
        self.backend = backend
        self.break_even = break_even
        self._packed: tuple[tuple, PackedBranch, ConvSpec | None] | None = None
        self.train(block.training)

    def part(self, path: str | None) -> nn.Module | None:
        """The original block's submodule at `path` (None for None)."""
        return None if path is None else self.block.get_submodule(path)

    @property
    def convs(self) -> list[nn.Conv2d]:
        """The branch's convolutions in order."""
        return [self.block.get_submodule(step.conv) for step in self.anatomy.steps]

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        _checks.images(x, self.convs[0].in_channels, "MaskedBlock")
        mask = self.gate(x)
        if self.training or self.backend == "eager" or torch.compiler.is_compiling() or self._norm_training():
            return self.dense_forward(x, mask)
        branch, projection = self._folded()
        shortcut = x if projection is None else self._project(x, projection)
        return masked_residual(x, mask, shortcut, branch, backend=self.backend, break_even=self.break_even)

    def dense_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The definition: branch everywhere, times the mask, plus the shortcut."""
        shortcut = self.part(self.anatomy.shortcut)
        act = self.part(self.anatomy.act)
        hidden = x
        for step in self.anatomy.steps:
            for path in (step.conv, step.norm, step.act):
                if path is not None:
                    hidden = self.block.get_submodule(path)(hidden)
        _checks.mask_for(mask, (hidden.shape[0], hidden.shape[2], hidden.shape[3]))
        y = (x if shortcut is None else shortcut(x)) + mask.to(hidden.dtype) * hidden
        return y if act is None else act(y)

    def _norm_training(self) -> bool:
        return any(n is not None and n.training for n in (self.part(s.norm) for s in self.anatomy.steps))

    def _project(self, x: Tensor, spec: ConvSpec) -> Tensor:
        return torch.nn.functional.conv2d(
            x, spec.weight, spec.bias, spec.stride, spec.padding, spec.dilation, spec.groups
        )

    def _folded(self) -> tuple[PackedBranch, ConvSpec | None]:
        """Folded and packed weights; recomputed whenever a parameter or buffer of the block has changed."""
        if torch.is_grad_enabled():
            return self._fold()
        tensors = (*self.block.parameters(), *self.block.buffers())
        key = tuple((id(t), t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
        if self._packed is None or self._packed[0] != key:
            self._packed = (key, *self._fold())
        return self._packed[1], self._packed[2]

    def _fold(self) -> tuple[PackedBranch, ConvSpec | None]:
        convs = [
            fold_conv(self.part(s.conv), self.part(s.norm), self.part(s.act)) for s in self.anatomy.steps
        ]
        act = activation_name(self.part(self.anatomy.act))
        assert act in ACTIVATIONS
        projection = self.part(self.anatomy.shortcut)
        folded = None if projection is None else fold_conv(*_conv_and_norm(projection), None)
        return PackedBranch.of(convs, act), folded

    def train(self, mode: bool = True) -> MaskedBlock:
        """Switch mode; the folded weights are dropped, since training will change what they were made of."""
        self._packed = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Copies and pickles leave the packed weights behind; they are rebuilt on first use."""
        return {**self.__dict__, "_packed": None}

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"kind={self.anatomy.kind!r}, backend={self.backend!r}"


def _conv_and_norm(projection: nn.Module) -> tuple[nn.Conv2d, nn.Module | None]:
    if isinstance(projection, nn.Conv2d):
        return projection, None
    parts = [m for m in projection if not isinstance(m, nn.Identity)]
    return parts[0], parts[1] if len(parts) > 1 else None
