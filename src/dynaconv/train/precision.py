"""Which arithmetic a run trains with."""

from __future__ import annotations

import torch

from dynaconv import _checks


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


def device_of(accelerator: str, processes: int = 1) -> str:
    """The kind of device, "cpu" or "cuda", for a recipe's accelerator (auto, cpu, gpu).

    Raises:
        ValueError: gpu was asked for, and there are fewer than one for each process.
    """
    enough = torch.cuda.is_available() and torch.cuda.device_count() >= processes
    if accelerator == "gpu" and not enough:
        raise _checks.train_no_gpu(torch.cuda.device_count(), processes)
    return "cuda" if enough and accelerator != "cpu" else "cpu"
