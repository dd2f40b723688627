"""One table of how far two ways to compute the same may lie apart, for tests and for `CompiledModel.verify`."""

from __future__ import annotations

import torch
from torch import Tensor

# Relative to the largest magnitude of the expected result. "op" is one operation or layer: the rounding of one long
# sum, for Winograd's of its transforms, too. "network" is some tens of them. bfloat16 rounds every map to 8 bits, which
# adds up to 0.5 % (ResNets) to 8 % (MobileNetV2) through untrained networks, as much as the network itself in bfloat16.
TOLERANCES: dict[str, dict[torch.dtype, float]] = {
    "op": {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 1e-2},
    "network": {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-1},
}


def assert_agree(got: Tensor, expected: Tensor, what: str = "op", dtype: torch.dtype | None = None) -> None:
    """Raise unless `got` equals `expected` within the table, and is NaN or infinite exactly where that is.

    Args:
        what: row of TOLERANCES.
        dtype: in which the result was computed, where that is not the dtype of `got`.
    Raises:
        AssertionError: another shape, or too far apart.
    """
    assert got.shape == expected.shape, f"shape {list(got.shape)}, expected {list(expected.shape)}"
    tolerance = TOLERANCES[what][dtype or got.dtype]
    a, b = got.double(), expected.double()
    finite = b.isfinite()
    same = (a == b) | (a.isnan() & b.isnan())
    assert bool((same | finite).all()), "not finite in other places than expected"
    if bool(finite.any()):
        error = float((a - b)[finite].abs().max() / b[finite].abs().max().clamp(min=1e-6))
        assert error <= tolerance, f"off by {error:.2e} of the largest magnitude, more than {tolerance:.0e}"


__all__ = ["TOLERANCES", "assert_agree"]
