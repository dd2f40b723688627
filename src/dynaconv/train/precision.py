"""Which arithmetic a run trains with."""

from __future__ import annotations

import torch


def native_bf16() -> bool:
    """Whether this processor multiplies bfloat16 natively (AVX512-BF16 or AMX); without it bf16 is slower than fp32.

    >>> native_bf16() in (True, False)
    True
    """
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    checks = (
        getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )
    return any(check() for check in checks if check is not None)


def lightning_precision(precision: str, device: str) -> str:
    """Lightning's name for a recipe's precision (auto, fp32, bf16) on "cpu" or "cuda"."""
    if precision == "auto":
        fast = (
            torch.cuda.is_available() and torch.cuda.is_bf16_supported()
            if device == "cuda"
            else native_bf16()
        )
        precision = "bf16" if fast else "fp32"
    return "bf16-mixed" if precision == "bf16" else "32-true"
