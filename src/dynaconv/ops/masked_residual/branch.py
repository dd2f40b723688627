"""A residual branch made ready for execution."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from dynaconv.ops import _native
from dynaconv.ops._conv import ConvSpec, Geometry
from dynaconv.ops._gemm_conv import pack_weight


@dataclass(frozen=True, eq=False)
class PackedBranch:
    """Convolutions in order (batch norm folded), their geometries, the block's activation.

    native: weights and biases for the compiled kernels, None where they are missing or cannot run the branch.
    """

    convs: tuple[ConvSpec, ...]
    geometries: tuple[Geometry, ...]
    macs_per_position: tuple[int, ...]
    activation: str
    native: Tensor | None
    # Weights, biases (zeros where there is none) and numbers as the op takes them.
    operands: tuple = field(repr=False)

    @classmethod
    def of(cls, convs: Sequence[ConvSpec], activation: str) -> PackedBranch:
        """Pack the weights of `convs` once."""
        operands = _operands(convs, activation)
        return cls(
            tuple(convs),
            tuple(conv.geometry for conv in convs),
            tuple(conv.macs_per_position for conv in convs),
            activation,
            _native.pack_branch(*operands),
            operands,
        )

    @functools.cached_property
    def packed(self) -> tuple[Tensor, ...]:
        """The weights as index lists want them."""
        return tuple(pack_weight(conv) for conv in self.convs)


def _operands(convs: Sequence[ConvSpec], activation: str) -> tuple:
    return (
        [conv.weight for conv in convs],
        [conv.weight.new_zeros(conv.weight.shape[0]) if conv.bias is None else conv.bias for conv in convs],
        [v for conv in convs for v in conv.stride],
        [v for conv in convs for v in conv.padding],
        [v for conv in convs for v in conv.dilation],
        [conv.groups for conv in convs],
        [_native.ACTIVATIONS.index(conv.activation) for conv in convs],
        _native.ACTIVATIONS.index(activation),
    )
