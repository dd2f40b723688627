"""`torch.ops.dynaconv.masked_residual`: what compilers see of a masked residual block."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from dynaconv.ops import _native, _registry
from dynaconv.ops._conv import ACTIVATIONS, ConvSpec
from dynaconv.ops._recompute import recompute_gradients
from dynaconv.ops.masked_residual import cpu, reference
from dynaconv.ops.masked_residual.branch import PackedBranch

# Of each convolution in turn: two numbers, two numbers, two numbers, one, one.
_Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int], Sequence[int]]


def _specs(weights: Sequence[Tensor], biases: Sequence[Tensor], geometry: _Geometry) -> list[ConvSpec]:
    strides, paddings, dilations, groups, activations = geometry
    return [
        ConvSpec(
            weight, biases[i], tuple(strides[2 * i : 2 * i + 2]), tuple(paddings[2 * i : 2 * i + 2]),
            tuple(dilations[2 * i : 2 * i + 2]), groups[i], _native.ACTIVATIONS[activations[i]],
        )
        for i, weight in enumerate(weights)
    ]  # fmt: skip


def arguments(
    x: Tensor,
    mask: Tensor,
    shortcut: Tensor,
    branch: PackedBranch,
    weights: Sequence[Tensor] | None,
    break_even: float | None,
    packed: Tensor | None,
) -> tuple:
    """What the op takes, from a packed branch; `weights` replaces the branch's own, see `masked_residual`."""
    if weights is None:
        return x, mask, shortcut, *branch.operands, break_even, packed
    rest, zeros = iter(weights), branch.operands[1]
    pairs = [
        (next(rest), z if c.bias is None else next(rest)) for c, z in zip(branch.convs, zeros, strict=True)
    ]
    own = [weight for weight, _ in pairs], [bias for _, bias in pairs]
    return x, mask, shortcut, *own, *branch.operands[2:], break_even, packed


def _eager(x: Tensor, mask: Tensor, shortcut: Tensor, weights, biases, *rest) -> Tensor:
    *geometry, activation, break_even, _ = rest
    convs, name = _specs(weights, biases, geometry), _native.ACTIVATIONS[activation]
    # The compiled library asks for all positions in this way.
    if cpu.can_run(x) is not None or (break_even is not None and break_even <= 0):
        return _registry.rows(reference.masked_residual(x, mask, shortcut, convs, name))
    branch = PackedBranch.of(convs, name)
    return _registry.rows(cpu.masked_residual(x, mask, shortcut, branch, break_even))


def _dense(x: Tensor, mask: Tensor, shortcut: Tensor, convs: Sequence[ConvSpec], activation: int) -> Tensor:
    for conv in convs:
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        x = conv.activate(x)
    return ACTIVATIONS[_native.ACTIVATIONS[activation]](shortcut + mask.to(x.dtype) * x)


def _decomposition(x: Tensor, mask: Tensor, shortcut: Tensor, weights, biases, *rest) -> Tensor:
    *geometry, activation, _, _ = rest
    return _registry.rows(_dense(x, mask, shortcut, _specs(weights, biases, geometry), activation))


def _fake(x: Tensor, mask: Tensor, shortcut: Tensor, weights, biases, *rest) -> Tensor:
    return _registry.empty_rows(shortcut, weights[-1].shape[0], tuple(shortcut.shape[2:]))


def _saved(ctx, inputs: tuple, output: Tensor) -> None:
    x, mask, shortcut, weights, biases, *ctx.rest = inputs
    ctx.count = len(weights)
    ctx.save_for_backward(x, mask, shortcut, *weights, *biases)


def _backward(ctx, grad: Tensor) -> tuple:
    *geometry, activation, _, _ = ctx.rest

    def forward(x, mask, shortcut, *parameters) -> Tensor:
        weights, biases = parameters[: ctx.count], parameters[ctx.count :]
        return _dense(x, mask, shortcut, _specs(weights, biases, geometry), activation)

    grads = recompute_gradients(forward, ctx.saved_tensors, grad)
    weights, biases = grads[3 : 3 + ctx.count], grads[3 + ctx.count :]
    return *grads[:3], weights, biases, *(None,) * 8


def _flops(
    x_shape, mask_shape, shortcut_shape, weights, biases, strides, paddings, dilations, *args, **kwargs
) -> int:
    size, total = tuple(x_shape[2:]), 0
    for i, shape in enumerate(weights):
        size = tuple(
            (size[a] + 2 * paddings[2 * i + a] - dilations[2 * i + a] * (shape[2 + a] - 1) - 1)
            // strides[2 * i + a]
            + 1
            for a in (0, 1)
        )
        total += 2 * shape.numel() * x_shape[0] * size[0] * size[1]
    return total


# Without defaults: torch leaves out arguments that have them, and then wants gradients of a list in another structure.
OP = _registry.register(
    "masked_residual",
    "Tensor x, Tensor mask, Tensor shortcut, Tensor[] weights, Tensor[] biases, int[] strides, int[] paddings, "
    "int[] dilations, int[] groups, int[] activations, int activation, float? break_even, Tensor? packed",
    eager=_eager,
    fake=_fake,
    saved=_saved,
    backward=_backward,
    flops=_flops,
    decomposition=_decomposition,
)
