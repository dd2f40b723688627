"""The compiled kernels: experts mixed while packed, and depthwise filters; evaluation on a CPU, float32, 2-D."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor, nn

from dynaconv.ops import _native
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, per_axis


class _Description(ctypes.Structure):
    _fields_ = [
        ("experts", ctypes.c_void_p),
        ("in_channels", ctypes.c_int32),
        ("out_channels", ctypes.c_int32),
        ("count", ctypes.c_int32),
        ("kernel", ctypes.c_int32 * 2),
        ("stride", ctypes.c_int32 * 2),
        ("padding", ctypes.c_int32 * 2),
        ("dilation", ctypes.c_int32 * 2),
        ("per_channel", ctypes.c_int32),
        ("planar", ctypes.c_int32),
    ]


class PackedExperts:
    """Experts in the kernel's layout, made when first asked for and again whenever they have changed.

    Copies and pickles of a layer leave the packed weights behind.
    """

    def __init__(self) -> None:
        self._key: tuple | None = None
        self._source: Tensor | None = None
        self._panels: Tensor | None = None

    def panels(self, experts: Tensor) -> Tensor:
        """[O / 32][taps * I][K][32], output channels padded with zeros, from experts [K, O, I, kh, kw].

        Depthwise experts [K, C, 1, kh, kw] become [K][taps][C].
        """
        version = 0 if experts.is_inference() else experts._version
        key = (experts.data_ptr(), version, tuple(experts.shape))
        panels = self._panels
        if panels is None or key != self._key:
            depthwise = experts.shape[2] == 1 and experts.shape[1] > 1
            pack = _tap_major if depthwise else _pack
            # Held, so that no other weights can come to lie at the same address.
            self._source = experts.detach()
            panels = pack(self._source)
            self._key, self._panels = key, panels
        return panels

    def __deepcopy__(self, memo: dict) -> PackedExperts:
        return PackedExperts()

    def __reduce__(self) -> tuple:
        return PackedExperts, ()


def _columns() -> int:
    library, _ = _native.load()
    assert library is not None
    return library.dynaconv_columns()


def _pack(experts: Tensor) -> Tensor:
    count, out_channels, columns = experts.shape[0], experts.shape[1], _columns()
    panels = -(-out_channels // columns)
    flat = experts.new_zeros(count, panels * columns, experts[0, 0].numel())
    flat[:, :out_channels] = experts.permute(0, 1, 3, 4, 2).flatten(2)
    return flat.view(count, panels, columns, -1).permute(1, 3, 0, 2).contiguous()


def _tap_major(experts: Tensor) -> Tensor:
    return experts.flatten(3)[:, :, 0].transpose(1, 2).contiguous()


def cannot_run(x: Tensor, weight: Tensor, groups: int, stride=1) -> str | None:
    """Why the compiled kernels cannot run on these, or None."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or not has_memory(x):
        return "compilers, tracers, function transforms and counters need operations that they can see"
    depthwise = groups > 1 and weight.dim() == 5 and weight.shape[2] == 1 and weight.shape[1] == groups
    if x.dim() != 4 or not (groups == 1 or depthwise):
        return "they convolve images in one group or in one for each channel"
    if depthwise and x.is_contiguous() and per_axis(stride, 2) != (1, 1):
        return "depthwise filters move in steps of one over planes"
    if x.device.type != "cpu" or x.dtype != torch.float32 or weight.dtype != torch.float32:
        return "they compute float32 on a CPU"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return _native.missing()


def has_memory(x: Tensor) -> bool:
    """False where tensors may only stand for others (`torch.vmap`, fake ones), or where a FLOP counter watches."""
    if type(x) not in (Tensor, nn.Parameter) or x.is_meta:
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def dynamic_conv(
    x: Tensor,
    panels: Tensor,
    shape: torch.Size,
    routing: Tensor,
    bias: Tensor | None,
    taps: Tensor | None,
    geometry: ConvGeometry,
) -> Tensor:
    """x [B, I, H, W] float32, experts of `shape` [K, O, I, kh, kw] as panels -> [B, O, h, w] in the format of x.

    Args:
        routing: [B, K] or [B, O, K]. bias: [B, O] or None. taps: [B, kh * kw] or None.
    """
    if geometry.groups > 1:
        return _depthwise(x, panels, shape, routing, bias, taps, geometry)
    library, _ = _native.load()
    assert library is not None
    count, out_channels, in_channels = shape[:3]
    n, padded = x.shape[0], panels.shape[0] * panels.shape[3]
    h, w = geometry.output_size(x.shape[2:], shape[3:])
    planar = x.is_contiguous()
    source = x.detach().permute(0, 2, 3, 1).contiguous()
    y = x.new_empty((n, out_channels, h, w) if planar else (n, h, w, out_channels))
    if routing.dim() == 3:
        coefficients = x.new_zeros(n, count, padded)
        coefficients[:, :, :out_channels] = routing.detach().transpose(1, 2)
    else:
        coefficients = routing.detach().to(torch.float32).contiguous()
    offsets = x.new_zeros(n, padded)
    if bias is not None:
        offsets[:, :out_channels] = bias.detach()
    scale = None if taps is None else taps.detach().to(torch.float32).contiguous()
    pair = ctypes.c_int32 * 2
    description = _Description(
        panels.data_ptr(), in_channels, out_channels, count, pair(*shape[3:]), pair(*geometry.stride),
        pair(*geometry.padding), pair(*geometry.dilation), int(routing.dim() == 3), int(planar),
    )  # fmt: skip
    status = library.dynaconv_dynamic_conv(
        source.data_ptr(), y.data_ptr(), n, x.shape[2], x.shape[3], h, w, ctypes.addressof(description),
        coefficients.data_ptr(), None if scale is None else scale.data_ptr(), offsets.data_ptr(),
    )  # fmt: skip
    if status == 2:
        raise MemoryError(f"no memory for a dynamic convolution on an input of shape {list(x.shape)}")
    return y if planar else y.permute(0, 3, 1, 2)


def _depthwise(x, panels: Tensor, shape, routing: Tensor, bias, taps, geometry: ConvGeometry) -> Tensor:
    """One filter a channel: the mixture is small, so PyTorch makes it, tap by tap."""
    library, _ = _native.load()
    assert library is not None
    n, channels, height, width = x.shape
    h, w = geometry.output_size((height, width), shape[3:])
    planar = x.is_contiguous()
    if routing.dim() == 3:
        mixed = torch.einsum("nck,ktc->ntc", routing.detach(), panels).contiguous()
    else:
        mixed = (routing.detach() @ panels.flatten(1)).view(n, -1, channels)
    if taps is not None:
        mixed = mixed * taps.detach()[:, :, None]
    if planar:
        mixed = mixed.transpose(1, 2).contiguous()
    offsets = x.new_zeros(n, channels)
    if bias is not None:
        offsets = offsets + bias.detach()
    source = x if planar else x.detach().permute(0, 2, 3, 1).contiguous()
    y = x.new_empty((n, channels, h, w) if planar else (n, h, w, channels))
    pair = ctypes.c_int32 * 2
    description = _Description(
        None, channels, channels, 1, pair(*shape[3:]), pair(*geometry.stride), pair(*geometry.padding),
        pair(*geometry.dilation), 0, int(planar),
    )  # fmt: skip
    status = library.dynaconv_sample_depthwise(
        source.data_ptr(), y.data_ptr(), n, height, width, h, w, ctypes.addressof(description), mixed.data_ptr(),
        offsets.data_ptr(),
    )  # fmt: skip
    if status == 2:
        raise MemoryError(f"no memory for a dynamic convolution on an input of shape {list(x.shape)}")
    return y if planar else y.permute(0, 3, 1, 2)
