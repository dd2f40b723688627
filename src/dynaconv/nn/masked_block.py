"""A residual block that computes its branch only where its gate asks for it.

Source: DynConv, arXiv 1912.03203, equation 1 and section 3.3; section 1.4 of the block table in docs/concepts.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.nn._fold import activation_name, fold_conv
from dynaconv.nn._fresh import Snapshot
from dynaconv.nn.block_program import Program, branch_needs, grids, macs_per_position
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_kernels import coefficients, needs_of, run_shortcut, sparse_branch
from dynaconv.nn.masked_program import run_dense
from dynaconv.nn.masked_rows import Packed, pack_program, run_rows
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.ops import ACTIVATIONS, ConvSpec, PackedBranch, masked_residual
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import branch_masks, branch_sizes
from dynaconv.ops.masked_residual.cpu import can_run


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
    for identity; act is the path of the final activation or None. A program says the same of any block: steps are then
    the layers of its branch that multiply, and with `plain` they say everything that happens in evaluation.
    """

    kind: str
    steps: tuple[Step, ...]
    shortcut: str | None = None
    act: str | None = None
    program: Program | None = None
    plain: bool = False

    @property
    def is_chain(self) -> bool:
        """In evaluation the steps, the shortcut and the final activation are all there is."""
        return self.program is None or self.plain


# Those of other branches, which run on PyTorch operations, row by row (docs/blocks.md).
_ROWS_BREAK_EVEN = _DYNAMIC_BREAK_EVEN = 0.6
_DEPTHWISE_BREAK_EVEN = 0.35


@dataclass(frozen=True, eq=False)
class _Runtime:
    """What evaluation needs, computed once: the packed branch, the folded projection, and what they were made of.

    branch: None where some kernel depends on the sample, or where there is more than a chain of convolutions.
    packed: weights for the latter.
    """

    branch: PackedBranch | None
    projection: ConvSpec | None
    in_channels: int
    norms: tuple[nn.Module, ...]
    snapshot: Snapshot
    packed: Packed | None = None


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
        """Where what multiplies in the branch is, from this module, in order."""
        prefix = "block.block" if isinstance(self.block, RoutedBlock) else "block"
        program = self.anatomy.program
        paths = (
            [s.conv for s in self.anatomy.steps]
            if program is None
            else [c.path for c in program.convolutions]
        )
        return [f"{prefix}.{path}" for path in paths]

    @property
    def in_channels(self) -> int:
        """C of the block's input."""
        program = self.anatomy.program
        return self.convs[0].in_channels if program is None else program.in_channels

    @property
    def stride(self) -> int:
        """From the input grid to the output grid."""
        if self.anatomy.program is not None:
            return self.anatomy.program.stride
        return math.prod(conv.stride[0] for conv in self.convs)

    def needs(self, mask: Tensor, size: tuple[int, int], gradient: str = "none") -> list[Tensor]:
        """The mask that each of `conv_paths` runs on, for an input of `size` = (H, W) and the mask [N, 1, h, w]."""
        if self.anatomy.program is None:
            geometries = [Geometry.of(conv) for conv in self.convs]
            return branch_masks(mask, branch_sizes(size, geometries), geometries, gradient=gradient)
        found = branch_needs(self.anatomy.program, mask, size, gradient)
        return [found[op.name] for op in self.anatomy.program.convolutions]

    @property
    def macs_per_position(self) -> list[int]:
        """Multiply-adds of each of `conv_paths` for one output position, a bias counted."""
        if self.anatomy.program is not None:
            return [macs_per_position(op, self.inner) for op in self.anatomy.program.convolutions]
        return [
            c.kernel_numel
            if isinstance(c, DynamicConv)
            else c.weight.numel() + (0 if c.bias is None else c.out_channels)
            for c in self.convs
        ]

    @property
    def dynamic(self) -> bool:
        """Some convolution of the branch or the shortcut has a kernel per sample."""
        shortcut = self.part(self.anatomy.shortcut)
        parts = self.convs if shortcut is None else [*self.convs, *shortcut.modules()]
        return any(isinstance(part, DynamicConv) for part in parts)

    def functions(self, size: tuple[int, int], biases: bool = True) -> dict[str, int]:
        """Multiply-adds of one image, all positions open, of convolutions that are functions and no layers."""
        program = self.anatomy.program
        if program is None:
            return {}
        prefix = "block.block" if isinstance(self.block, RoutedBlock) else "block"
        where, found = grids(program, size), {}
        for op in (*program.before, *program.branch):
            if op.weights and op.call == "function":
                # Behind a pool of the shortcut, the grid is that of what the shortcut is added to.
                grid = where.get(op.name, where[program.result])
                macs = math.prod(grid) * (op.weights + (op.bias if biases else 0))
                path = f"{prefix}.{op.path}"
                found[path] = found.get(path, 0) + macs
        return found

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, C_out, h, w]."""
        runtime = self._runtime
        _checks.images(x, self.in_channels if runtime is None else runtime.in_channels, "MaskedBlock")
        return self.run(x, self.gate(x))

    def run(self, x: Tensor, mask: Tensor) -> Tensor:
        """The block with a mask that was decided already: densely in training, open positions only in evaluation."""
        if self.training or self.backend == "eager" or torch.compiler.is_compiling():
            return self.dense_forward(x, mask)
        runtime = self._prepared()
        if runtime.packed is not None:
            return self._sparse_program(x, mask, runtime)
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
        if self.anatomy.program is not None:
            shared = self.block.route(x) if isinstance(self.block, RoutedBlock) else {}
            return run_dense(self.anatomy.program, self.inner, x, mask, shared)
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

    def _sparse_program(self, x: Tensor, mask: Tensor, runtime: _Runtime) -> Tensor:
        """Open positions only; densely for gradients, in mixed precision and above the break-even."""
        why = self._why_dense(x, runtime)
        if self.backend == "cpu" and why:
            raise _checks.grad_free_backend("MaskedBlock", "cpu", why)
        if not why and self._share(mask, (x.shape[2], x.shape[3])) > self._limit():
            why = "too much is open"
        if why:
            return self.dense_forward(x, mask)
        shared = self.block.route(x) if isinstance(self.block, RoutedBlock) else {}
        return run_rows(self.anatomy.program, self.inner, x, mask, shared, runtime.packed)

    def _why_dense(self, x: Tensor, runtime: _Runtime) -> str | None:
        tensors = [x, *self.block.parameters()]
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return "its branch runs row by row without gradients; use torch.no_grad()"
        if any(norm.training for norm in runtime.norms):
            return "a batch norm in it is in training mode"
        if not all(conv.has_kernels for conv in self.convs if isinstance(conv, DynamicConv)):
            return "a dynamic layer in it cannot write down its kernels"
        return can_run(x)

    def _share(self, mask: Tensor, size: tuple[int, int]) -> float:
        """Executed share of the branch's multiply-adds."""
        _checks.mask_for(mask, (mask.shape[0], *self.gate_grid(size)))
        needs, macs = self.needs(mask, size), self.macs_per_position
        executed = sum(float(n.sum()) * m for n, m in zip(needs, macs, strict=True))
        return executed / max(1, sum(n.numel() * m for n, m in zip(needs, macs, strict=True)))

    def gate_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """The grid (h, w) of the block's mask for an input of `size` = (H, W)."""
        return (size[0] - 1) // self.stride + 1, (size[1] - 1) // self.stride + 1

    def _limit(self) -> float:
        if self.break_even is not None:
            return self.break_even
        depthwise = any(getattr(c, "groups", 1) > 1 and c.groups == c.in_channels for c in self.convs)
        return _DEPTHWISE_BREAK_EVEN if depthwise else _ROWS_BREAK_EVEN

    def _prepared(self) -> _Runtime:
        """Folded and packed weights; made again whenever a parameter or buffer of the block has changed."""
        if self._runtime is None or not self._runtime.snapshot.fresh():
            with torch.no_grad():
                self._runtime = self._prepare()
        return self._runtime

    def _prepare(self) -> _Runtime:
        norms = tuple(m for m in self.block.modules() if isinstance(m, _BatchNorm))
        if not self.anatomy.is_chain:
            packed = pack_program(self.anatomy.program, self.inner)
            return _Runtime(None, None, self.in_channels, norms, Snapshot([self.block]), packed)
        if self.dynamic:
            return _Runtime(None, None, self.in_channels, (), Snapshot([self.block]))
        convs, projection = self._fold()
        act = activation_name(self.part(self.anatomy.act))
        assert act in ACTIVATIONS
        return _Runtime(
            PackedBranch.of(convs, act),
            projection,
            convs[0].weight.shape[1] * convs[0].groups,
            norms,
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
    parts = [m for m in projection.children() if not isinstance(m, nn.Identity)]
    return parts[0], parts[1] if len(parts) > 1 else None
