"""A residual block that computes its branch only where its gate asks for it.

Source: DynConv, arXiv 1912.03203, equation 1 and section 3.3; section 1.4 of the block table in docs/concepts.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.nn._fold import activation_name, fold_conv
from dynaconv.nn._fresh import Snapshot
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_kernels import coefficients, needs_of, run_shortcut, sparse_branch
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.ops import ACTIVATIONS, ConvSpec, PackedBranch, masked_residual


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


# That of other branches which run on PyTorch operations, row by row (docs/benchmarks.md).
_DYNAMIC_BREAK_EVEN = 0.6


@dataclass(frozen=True, eq=False)
class _Runtime:
    """What evaluation needs, computed once: the packed branch, the folded projection, and what they were made of.

    branch: None where some kernel depends on the sample.
    """

    branch: PackedBranch | None
    projection: ConvSpec | None
    in_channels: int
    norms: tuple[nn.Module, ...]
    snapshot: Snapshot


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
        break_even: executed share of the branch's MACs above which it is computed densely; None takes the measured one.
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
        break_even: float | None = None,
    ) -> None:
        super().__init__()
        self.block = block
        self.gate = gate
        self.anatomy = anatomy
        self.config = config
        self.dilation_gradient = dilation_gradient
        self.backend = backend
        self.break_even = break_even
        self._runtime: _Runtime | None = None
        # The block's parts keep their modes: a norm that was frozen by hand stays frozen.
        self.training = block.training
        gate.train(block.training)

    @property
    def inner(self) -> nn.Module:
        """The block that the anatomy describes; inside a `RoutedBlock` where a router is shared."""
        return self.block.block if isinstance(self.block, RoutedBlock) else self.block

    def part(self, path: str | None) -> nn.Module | None:
        """The original block's submodule at `path` (None for None)."""
        return None if path is None else self.inner.get_submodule(path)

    @property
    def convs(self) -> list[nn.Module]:
        """The branch's convolutions in order, static or dynamic."""
        return [self.inner.get_submodule(step.conv) for step in self.anatomy.steps]

    @property
    def conv_paths(self) -> list[str]:
        """Where those convolutions are, from this module."""
        prefix = "block.block" if isinstance(self.block, RoutedBlock) else "block"
        return [f"{prefix}.{step.conv}" for step in self.anatomy.steps]

    @property
    def dynamic(self) -> bool:
        """Some convolution of the branch or the shortcut has a kernel per sample."""
        shortcut = self.part(self.anatomy.shortcut)
        parts = self.convs if shortcut is None else [*self.convs, *shortcut.modules()]
        return any(isinstance(part, DynamicConv) for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        runtime = self._runtime
        _checks.images(
            x, self.convs[0].in_channels if runtime is None else runtime.in_channels, "MaskedBlock"
        )
        return self.run(x, self.gate(x))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        """The block with a mask that was decided already: densely in training, open positions only in evaluation."""
        if self.training or self.backend == "eager" or torch.compiler.is_compiling():
            return self.dense_forward(x, mask)
        runtime = self._prepared()
        if runtime.branch is None:
            return self._sparse_dynamic(x, mask)
        for norm in runtime.norms:
            if norm.training:
                return self.dense_forward(x, mask)
        projection, weights = runtime.projection, None
        if torch.is_grad_enabled():
            # The packed weights give the values; these carry the gradient.
            convs, projection = self._fold()
            weights = [t for conv in convs for t in (conv.weight, conv.bias) if t is not None]
        return masked_residual(
            x,
            mask,
            x if projection is None else _project(x, projection),
            runtime.branch,
            weights=weights,
            backend=self.backend,
            break_even=self.break_even,
        )

    def dense_forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """The definition: branch everywhere, times the mask, plus the shortcut.

        Kernels that depend on an inner feature map see only the positions of it that skipping would compute.
        """
        convs, hidden, open_ = self.convs, x, None
        shared = self.block.route(x) if isinstance(self.block, RoutedBlock) else {}
        needs = needs_of(mask.detach(), x.shape[2:], convs) if self.dynamic else [None] * len(convs)
        for step, conv, need in zip(self.anatomy.steps, convs, needs, strict=True):
            if isinstance(conv, DynamicConv):
                hidden = conv(hidden, routing=coefficients(conv, step.conv, shared, hidden, open_))
            else:
                hidden = conv(hidden)
            for path in (step.norm, step.act):
                if path is not None:
                    hidden = self.inner.get_submodule(path)(hidden)
            open_ = need
        _checks.mask_for(mask, (hidden.shape[0], hidden.shape[2], hidden.shape[3]))
        return self._joined(x, mask.to(hidden.dtype) * hidden, shared)

    def _joined(self, x: Tensor, branch: Tensor, shared: dict[str, Tensor]) -> Tensor:
        act, path = self.part(self.anatomy.act), self.anatomy.shortcut
        y = (x if path is None else run_shortcut(x, self.part(path), path, shared)) + branch
        return y if act is None else act(y)

    def _sparse_dynamic(self, x: Tensor, mask: Tensor) -> Tensor:
        """Open positions only, each image with its own kernels; densely above the break-even."""
        convs = self.convs
        if any(m.training for m in self.inner.modules() if isinstance(m, _BatchNorm)):
            return self.dense_forward(x, mask)
        _checks.mask_for(mask, (x.shape[0], *mask.shape[2:]))
        if not all(conv.has_kernels for conv in convs if isinstance(conv, DynamicConv)):
            return self.dense_forward(x, mask)
        needs = needs_of(mask, x.shape[2:], convs)
        costs = [c.kernel_numel if isinstance(c, DynamicConv) else c.weight.numel() for c in convs]
        share = sum(float(n.mean()) * c * n[0].numel() for n, c in zip(needs, costs, strict=True))
        share /= sum(n[0].numel() * c for n, c in zip(needs, costs, strict=True))
        if share > (_DYNAMIC_BREAK_EVEN if self.break_even is None else self.break_even):
            return self.dense_forward(x, mask)
        shared = self.block.route(x) if isinstance(self.block, RoutedBlock) else {}
        steps = [(s.conv, self.part(s.conv), self.part(s.norm), self.part(s.act)) for s in self.anatomy.steps]
        return self._joined(x, sparse_branch(x, steps, shared, needs), shared)

    def _prepared(self) -> _Runtime:
        """Folded and packed weights; made again whenever a parameter or buffer of the block has changed."""
        if self._runtime is None or not self._runtime.snapshot.fresh():
            with torch.no_grad():
                self._runtime = self._prepare()
        return self._runtime

    def _prepare(self) -> _Runtime:
        if self.dynamic:
            return _Runtime(None, None, self.convs[0].in_channels, (), Snapshot([self.block]))
        convs, projection = self._fold()
        act = activation_name(self.part(self.anatomy.act))
        assert act in ACTIVATIONS
        return _Runtime(
            PackedBranch.of(convs, act),
            projection,
            convs[0].weight.shape[1] * convs[0].groups,
            tuple(m for m in self.block.modules() if isinstance(m, _BatchNorm)),
            Snapshot([self.block]),
        )

    def _fold(self) -> tuple[list[ConvSpec], ConvSpec | None]:
        """The branch's convolutions and the projection with batch norm folded in, differentiably."""
        convs = [
            fold_conv(self.part(s.conv), self.part(s.norm), self.part(s.act)) for s in self.anatomy.steps
        ]
        shortcut = self.part(self.anatomy.shortcut)
        return convs, None if shortcut is None else fold_conv(*_conv_and_norm(shortcut), None)

    def train(self, mode: bool = True) -> MaskedBlock:
        """Switch mode; the folded weights are dropped, since training will change what they were made of."""
        self._runtime = None
        return super().train(mode)

    def __getstate__(self) -> dict:
        """Copies and pickles leave the packed weights behind; they are rebuilt on first use."""
        return {**self.__dict__, "_runtime": None}

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"kind={self.anatomy.kind!r}, backend={self.backend!r}"


def _shortcut(module: nn.Module, path: str, x: Tensor, shared: dict[str, Tensor]) -> Tensor:
    """The projection, with coefficients for the layer in it that a shared router serves."""
    if path in shared:
        return module(x, routing=shared[path])
    if not isinstance(module, nn.Sequential):
        return module(x)
    for name, part in module.named_children():
        x = _shortcut(part, f"{path}.{name}", x, shared)
    return x


def _project(x: Tensor, conv: ConvSpec) -> Tensor:
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)


def _conv_and_norm(projection: nn.Module) -> tuple[nn.Conv2d, nn.Module | None]:
    if isinstance(projection, nn.Conv2d):
        return projection, None
    parts = [m for m in projection if not isinstance(m, nn.Identity)]
    return parts[0], parts[1] if len(parts) > 1 else None
