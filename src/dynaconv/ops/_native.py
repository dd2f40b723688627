"""The compiled kernels, when they are built: found, loaded and called through plain C functions.

`make setup` compiles csrc/kernels into this package where there is a C++ compiler. Without them every op runs on
PyTorch operations. The library is linked against no OpenMP runtime: its parallel loops bind to the one that torch has
loaded, so that both share one pool of threads and torch.set_num_threads holds for both.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dynaconv.ops._conv import ConvSpec

ABI = 4
LIBRARY = Path(__file__).resolve().parent.parent / "lib" / "libdynaconv_kernels.so"
# The order is that of `apply` in csrc/kernels/tile.h.
ACTIVATIONS = ("none", "relu", "relu6", "silu")


class _Conv(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("in_channels", ctypes.c_int32),
        ("out_channels", ctypes.c_int32),
        ("kernel", ctypes.c_int32 * 2),
        ("stride", ctypes.c_int32 * 2),
        ("padding", ctypes.c_int32 * 2),
        ("dilation", ctypes.c_int32 * 2),
        ("activation", ctypes.c_int32),
        ("depthwise", ctypes.c_int32),
    ]


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
        return None, "the compiled kernels are from another version; run `make setup`"
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    library.dynaconv_isa.restype = ctypes.c_char_p
    library.dynaconv_masked_residual.argtypes = [
        pointer, pointer, pointer, pointer, i64, pointer, ctypes.c_int, pointer, ctypes.c_int, ctypes.c_double,
    ]  # fmt: skip
    library.dynaconv_mask_logits.argtypes = [pointer] * 3 + [ctypes.c_float] + [i64] * 5 + [pointer]
    library.dynaconv_mask_logits.restype = None
    library.dynaconv_dynamic_conv.argtypes = [pointer, pointer] + [i64] * 5 + [pointer] * 4
    library.dynaconv_sample_depthwise.argtypes = [pointer, pointer] + [i64] * 5 + [pointer] * 3
    return library, library.dynaconv_isa().decode()


def missing() -> str | None:
    """Why the compiled kernels cannot be used, or None when they can."""
    library, text = load()
    return text if library is None else None


@dataclass(frozen=True, eq=False)
class NativeBranch:
    """A branch in the layout of the compiled kernels; holds on to the tensors that the structures point into."""

    convs: ctypes.Array
    tensors: tuple[Tensor, ...]
    activation: int

    @classmethod
    def of(cls, convs: Sequence[ConvSpec], activation: str) -> NativeBranch | None:
        """Pack a branch, or None when the kernels are missing or cannot run it."""
        library, _ = load()
        names = (*(c.activation for c in convs), activation)
        if library is None or any(n not in ACTIVATIONS for n in names):
            return None
        if any(
            (c.groups != 1 and not c.depthwise)
            or c.weight.dtype != torch.float32
            or c.weight.device.type != "cpu"
            for c in convs
        ):
            return None
        columns = library.dynaconv_columns()
        tensors: list[Tensor] = []
        structures = []
        for conv in convs:
            weight, bias = _panels(conv, columns)
            tensors += [weight, bias]
            structures.append(_structure(conv, weight, bias))
        return cls((_Conv * len(convs))(*structures), tuple(tensors), ACTIVATIONS.index(activation))


def _panels(conv: ConvSpec, columns: int) -> tuple[Tensor, Tensor]:
    """Weight as [O / columns][taps * I][columns] and bias as [O], both padded with zeros; depthwise [taps][O]."""
    out_channels, in_channels, kh, kw = conv.weight.shape
    if conv.depthwise:
        bias = torch.zeros(out_channels) if conv.bias is None else conv.bias.detach().clone()
        return conv.weight.detach().view(out_channels, kh * kw).t().contiguous(), bias
    depth, panels = kh * kw * in_channels, -(-out_channels // columns)
    weight = torch.zeros(panels * columns, depth)
    weight[:out_channels] = conv.weight.detach().permute(0, 2, 3, 1).reshape(out_channels, depth)
    bias = torch.zeros(panels * columns)
    if conv.bias is not None:
        bias[:out_channels] = conv.bias.detach()
    return weight.view(panels, columns, depth).transpose(1, 2).contiguous(), bias


def _structure(conv: ConvSpec, weight: Tensor, bias: Tensor) -> _Conv:
    pair = ctypes.c_int32 * 2
    geometry = conv.geometry
    return _Conv(
        weight.data_ptr(), bias.data_ptr(), conv.weight.shape[1] * conv.groups, conv.weight.shape[0],
        pair(*geometry.kernel),
        pair(*geometry.stride), pair(*geometry.padding), pair(*geometry.dilation), ACTIVATIONS.index(conv.activation),
        int(conv.depthwise),
    )  # fmt: skip


def masked_residual(
    x: Tensor,
    mask: Tensor,
    shortcut: Tensor,
    branch: NativeBranch,
    sizes: Sequence[tuple[int, int]],
    break_even: float,
) -> Tensor | None:
    """The whole block in one call; None when more than `break_even` of it would be computed.

    Args:
        x: [N, C, H, W] float32. mask: [N, 1, h, w] float32. shortcut: [N, C_out, h, w] float32.
        sizes: grid of the input and of every convolution's output.
    """
    library, _ = load()
    assert library is not None
    n, _, height, width = shortcut.shape
    source, before = x.permute(0, 2, 3, 1).contiguous(), shortcut.permute(0, 2, 3, 1).contiguous()
    mask = mask.contiguous()
    after = torch.empty_like(before)
    grids = (ctypes.c_int64 * (2 * len(sizes)))(*(v for size in sizes for v in size))
    status = library.dynaconv_masked_residual(
        source.data_ptr(), mask.data_ptr(), before.data_ptr(), after.data_ptr(), n, ctypes.addressof(branch.convs),
        len(branch.convs), ctypes.addressof(grids), branch.activation, break_even,
    )  # fmt: skip
    if status == 2:
        raise MemoryError(f"no memory for a masked block on an input of shape {list(x.shape)}")
    return None if status else after.permute(0, 3, 1, 2)


def mask_logits(x: Tensor, taps: Tensor, linear: Tensor, bias: float, stride: int) -> Tensor:
    """Squeeze mask unit in one call: x [N, C, H, W] float32, taps [9, C], linear [C] -> logits [N, 1, h, w]."""
    library, _ = load()
    assert library is not None
    n, channels, height, width = x.shape
    source = x.permute(0, 2, 3, 1).contiguous()
    z = torch.empty(n, 1, (height - 1) // stride + 1, (width - 1) // stride + 1)
    library.dynaconv_mask_logits(
        source.data_ptr(),
        taps.data_ptr(),
        linear.data_ptr(),
        bias,
        n,
        height,
        width,
        channels,
        stride,
        z.data_ptr(),
    )
    return z
