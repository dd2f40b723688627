"""The compiled kernels, when they are built: found, loaded and given to torch as operators.

`make setup` compiles csrc into two libraries of this package where there is a C++ compiler: the kernels, and the torch
operators that call them. Without them every op runs on PyTorch operations. The kernels are linked against no OpenMP
runtime: their parallel loops bind to the one that torch has loaded, so that both share one pool of threads and
torch.set_num_threads holds for both.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

ABI = 5
LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libdynaconv_kernels.so"
OPERATORS = LIBRARY.with_name("libdynaconv_ops.so")
STALE = "the compiled kernels are from another version; run `make setup`, or install dynaconv again"
MARKER = b"dynaconv operators, version 1"
# The order is that of `Activation` in csrc/plan/plan.h.
ACTIVATIONS = (
    "none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "gelu", "leaky_relu",
)  # fmt: skip


@functools.cache
def load() -> tuple[ctypes.CDLL | None, str]:
    """The library and its instruction set, or None and the reason why it is not there."""
    if os.environ.get("DYNACONV_NATIVE", "1") == "0":
        return None, "DYNACONV_NATIVE=0 switches the compiled kernels off"
    if not LIBRARY.is_file():
        return (
            None,
            "the compiled kernels are not built; `make setup` builds them where there is a C++ compiler",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY), mode=os.RTLD_NOW)
    except OSError as error:
        return None, f"the compiled kernels do not load: {error}"
    if library.dynaconv_abi() != ABI:
        return None, STALE
    library.dynaconv_isa.restype = ctypes.c_char_p
    return library, library.dynaconv_isa().decode()


@functools.cache
def load_operators() -> str | None:
    """Give the operators of `torch.ops.dynaconv` their compiled form; why that cannot be, or None when it is done."""
    library, text = load()
    if library is None:
        return text
    if not OPERATORS.is_file():
        return "the torch operators are not built; `make setup` builds them"
    # Once loaded they are registered, so that the version has to be read before.
    if MARKER not in OPERATORS.read_bytes():
        return "the torch operators are from another version; run `make setup`"
    try:
        torch.ops.load_library(str(OPERATORS))
    except OSError as error:
        return f"the torch operators do not load: {error}"
    return None


def missing() -> str | None:
    """Why the compiled kernels cannot be used, or None when they can."""
    return load_operators()


def pack_branch(weights: Sequence[Tensor], biases: Sequence[Tensor], *numbers: object) -> Tensor | None:
    """A branch in the layout of the kernels, or None when they are missing or cannot run it.

    numbers: strides, paddings, dilations, groups and activations of its convolutions, and the final activation.
    """
    usable = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (*weights, *biases))
    if missing() is not None or not usable:
        return None
    with torch.no_grad():
        return torch.ops.dynaconv.pack_branch(weights, biases, *numbers)
