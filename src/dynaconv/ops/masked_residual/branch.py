"""A residual branch made ready for execution."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from dynaconv.ops._conv import ConvSpec, Geometry
from dynaconv.ops._gemm_conv import pack_weight
from dynaconv.ops._native import NativeBranch


@dataclass(frozen=True, eq=False)
class PackedBranch:
    """Convolutions in order (batch norm folded), their packed weights and geometries, the block's activation.

    native: the same for the compiled kernels, None where they are missing or cannot run the branch.
    """

    convs: tuple[ConvSpec, ...]
    packed: tuple[Tensor, ...]
    geometries: tuple[Geometry, ...]
    macs_per_position: tuple[int, ...]
    activation: str
    native: NativeBranch | None

    @classmethod
    def of(cls, convs: Sequence[ConvSpec], activation: str) -> PackedBranch:
        """Pack the weights of `convs` once."""
        return cls(
            tuple(convs),
            tuple(pack_weight(conv) for conv in convs),
            tuple(conv.geometry for conv in convs),
            tuple(conv.macs_per_position for conv in convs),
            activation,
            NativeBranch.of(convs, activation),
        )
