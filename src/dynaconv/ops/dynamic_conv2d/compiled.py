"""The compiled kernels: experts mixed while packed, and depthwise filters; evaluation on a CPU, float32, 2-D."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dynaconv.ops import _native, _registry
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry, is_channels_last
from dynaconv.ops.dynamic_conv2d.op import OP


class PackedExperts:
    """Experts in the kernel's layout, made when first asked for and again whenever they have changed.

    Copies and pickles of a layer leave the packed weights behind.
    """

    def __init__(self) -> None:
        # Address, version, the experts (held, so that no others can come to lie at the same address), panels.
        self._made: tuple[int, int, Tensor, Tensor] | None = None

    def panels(self, experts: Tensor) -> Tensor:
        """[O / 32][taps * I][K][32], output channels padded with zeros, from experts [K, O, I, kh, kw].

        Depthwise experts [K, C, 1, kh, kw] become [K][taps][C].
        """
        address, version = experts.data_ptr(), 0 if experts.is_inference() else experts._version
        made = self._made
        if made is not None and made[0] == address and made[1] == version and made[2].shape == experts.shape:
            return made[3]
        source = experts.detach()
        panels = (_tap_major if experts.shape[2] == 1 and experts.shape[1] > 1 else _pack)(source)
        self._made = address, version, source, panels
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
    geometry = ConvGeometry.of(weight.dim() - 3, stride, 0, 1, groups)
    return cannot_run_now(x, weight) or cannot_run_shapes(weight.shape, geometry, is_channels_last(x))


def cannot_run_now(x: Tensor, weight: Tensor) -> str | None:
    """What stands against them that does not follow from shapes."""
    if x.dtype is not torch.float32 or weight.dtype is not torch.float32 or not x.is_cpu:
        return "they compute float32 on a CPU"
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None or not has_memory(x):
        return "compilers, tracers, function transforms and counters need operations that they can see"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    return _native.missing()


def cannot_run_shapes(weight_shape: Sequence[int], geometry: ConvGeometry, channels_last: bool) -> str | None:
    """What stands against them in the shapes."""
    depthwise = geometry.groups > 1 and weight_shape[2] == 1 and weight_shape[1] == geometry.groups
    if len(weight_shape) != 5 or not (geometry.groups == 1 or depthwise):
        return "they convolve images in one group or in one for each channel"
    if depthwise and not channels_last and geometry.stride != (1, 1):
        return "depthwise filters move in steps of one over planes"
    return None


def has_memory(x: Tensor) -> bool:
    """False where tensors may only stand for others (`torch.vmap`, fake ones), or where a FLOP counter watches."""
    if type(x) is not Tensor and type(x) is not nn.Parameter or x.is_meta:
        return False
    return torch._C._len_torch_dispatch_stack() == 0 and torch._C._functorch.peek_interpreter_stack() is None


def dynamic_conv(
    x: Tensor,
    experts: Tensor,
    routing: Tensor,
    bias,
    static_bias,
    taps,
    geometry: ConvGeometry,
    panels: Tensor,
) -> Tensor:
    """By the compiled kernel, without a gradient; arguments as in `dynamic_conv2d`, panels from `PackedExperts`."""
    return _registry.below_autograd(
        OP, x, experts, routing, bias, static_bias, taps, *geometry.numbers, panels
    )
