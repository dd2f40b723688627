"""What all convolutions with a kernel per sample share: `nn.Conv2d`'s arguments, padding, costs, checks."""

from __future__ import annotations

import math
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _ntuple

from dynaconv import _checks
from dynaconv.ops.dynamic_conv2d import EXECUTIONS
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.ops.dynamic_conv2d.geometry import PADDING_MODES, ConvGeometry, pad_axes, same_padding

STATIC_CONVS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class KernelMacs(NamedTuple):
    """Multiply-adds of one image: the convolution itself, building its kernel, deciding the coefficients."""

    static: int
    mixing: int
    routing: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.static + self.mixing + self.routing


class DynamicLayer(nn.Module):
    """Marks every layer with weights per sample; `config` is what a conversion was asked for, or None."""

    config: object = None

    def _apply(self, fn, recurse=True):
        # Experts are mixed as flat rows: a change of memory format must not reorder them, nor fail on five axes.
        weight = self.weight

        def in_order(t: Tensor) -> Tensor:
            if t.shape != weight.shape or not self.mixes_experts:
                return fn(t)
            return fn(t.flatten(1)).reshape(t.shape)

        return super()._apply(in_order, recurse)

    @property
    def mixes_experts(self) -> bool:
        """`weight` holds several kernels."""
        return self.weight.dim() == 5


class DynamicConv(DynamicLayer):
    """Base class: a convolution whose kernel is computed for each sample.

    A subclass has `weight` (and perhaps `bias`), a `router` that predicts coefficients from the layer's own input, and
    implements `forward(x, routing=None)`, `kernels(routing)`, `macs(positions)`, `from_conv`, `to_conv` and
    `fold_norm_`. With `routing` given, the router is not asked, so that one router can serve a whole block.

    Attributes are those of `nn.Conv2d`, plus `execution` (see `dynaconv.ops.dynamic_conv2d`), `router` (None where the
    coefficients always come from outside) and `static_bias` [O] or None, added once, outside any mixture.
    """

    dims: ClassVar[int]
    router: nn.Module | None
    static_bias: nn.Parameter | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups: int = 1,
        padding_mode: str = "zeros",
        *,
        execution: str = "auto",
    ) -> None:
        super().__init__()
        _checks.channels_and_groups(type(self).__name__, in_channels, out_channels, groups)
        _checks.one_of("padding_mode", padding_mode, PADDING_MODES)
        _checks.one_of("execution", execution, EXECUTIONS)
        per_axis = _ntuple(self.dims)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride = per_axis(kernel_size), per_axis(stride)
        self.dilation, self.padding_mode, self.execution = per_axis(dilation), padding_mode, execution
        if isinstance(padding, str):
            _checks.one_of("padding", padding, ("same", "valid"))
            if padding == "same" and any(s != 1 for s in self.stride):
                raise ValueError(
                    f"padding='same' needs stride 1, got stride {self.stride}; give the padding in pixels"
                )
        self.padding = padding if isinstance(padding, str) else per_axis(padding)
        self.router = None
        self.packed = PackedExperts()
        self.register_parameter("static_bias", None)

    @property
    def kernel_numel(self) -> int:
        """P: weights of the kernel that convolves one sample."""
        return self.out_channels * self.in_channels // self.groups * math.prod(self.kernel_size)

    @property
    def has_kernels(self) -> bool:
        """`kernels` can write the layer as one kernel for each sample."""
        return True

    def borders(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Padding before and after each axis, in pixels."""
        if self.padding == "valid":
            return (0,) * self.dims, (0,) * self.dims
        if self.padding == "same":
            return same_padding(self.kernel_size, self.dilation)
        return self.padding, self.padding

    def padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """x with the padding that a convolution cannot do by itself, and the zero padding that is left to it."""
        before, after = self.borders()
        if self.padding_mode == "zeros" and before == after:
            return x, before
        return pad_axes(x, before, after, self.padding_mode), (0,) * self.dims

    def geometry(self, padding: tuple[int, ...]) -> ConvGeometry:
        """Stride, dilation and groups with this zero padding."""
        return ConvGeometry(self.stride, padding, self.dilation, self.groups)

    def route(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Coefficients for x from the layer's own router; mask [B, 1, *size] restricts its pooling to open positions.

        Raises:
            ValueError: the layer was made without a router.
        """
        if self.router is None:
            raise _checks.no_router(type(self).__name__)
        return self.router(x, mask)

    def train(self, mode: bool = True) -> DynamicConv:
        """Switch mode; the packed experts are dropped, since training will change what they were made of."""
        self.packed = PackedExperts()
        return super().train(mode)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """x [B, I, *size] -> [B, O, *size']."""
        raise TypeError(f"{type(self).__name__} must implement forward(x, routing=None)")

    def macs(self, positions: int) -> KernelMacs:
        """Multiply-adds for one image with this many output positions."""
        raise TypeError(f"{type(self).__name__} must implement macs(positions)")

    def kernels(self, routing: Tensor) -> tuple[Tensor, Tensor | None]:
        """Kernel [B, O, I/g, *kernel] and bias [B, O] (or None) that convolve each sample, everything included."""
        raise TypeError(f"{type(self).__name__} must implement kernels(routing)")

    def fold_norm_(self, norm: nn.Module) -> None:
        """Absorb a batch norm that follows, as it is in evaluation mode, exactly."""
        raise TypeError(f"{type(self).__name__} must implement fold_norm_(norm)")

    def add_static_bias_(self, value: Tensor) -> None:
        """Add value [O] to the bias outside the mixture."""
        with torch.no_grad():
            if self.static_bias is None:
                self.static_bias = nn.Parameter(value.detach().clone())
            else:
                self.static_bias += value

    @classmethod
    def conv_arguments(cls, conv: nn.Module) -> dict:
        """Constructor arguments that repeat a static convolution (bias apart).

        Raises:
            TypeError: not a plain convolution of this many axes: transposed, quantised, lazy, dynamic, or a subclass
                with a forward of its own.
        """
        expected = STATIC_CONVS[cls.dims]
        if not _computes_as(conv, expected) or isinstance(conv, nn.modules.lazy.LazyModuleMixin):
            raise _checks.not_convertible(cls.__name__, expected.__name__, conv)
        names = (
            "in_channels",
            "out_channels",
            "kernel_size",
            "stride",
            "padding",
            "dilation",
            "groups",
            "padding_mode",
        )
        own = {name: getattr(conv, name) for name in names}
        return {**own, "device": conv.weight.device, "dtype": conv.weight.dtype}

    def static_conv(self, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A static convolution of the same geometry with these weights [O, I/g, *kernel] and bias [O]."""
        with torch.device("meta"):
            conv = STATIC_CONVS[self.dims](
                self.in_channels, self.out_channels, self.kernel_size, self.stride, self.padding, self.dilation,
                self.groups, bias is not None, self.padding_mode,
            )  # fmt: skip
        conv.weight = nn.Parameter(weight.detach().clone())
        if bias is not None:
            conv.bias = nn.Parameter(bias.detach().clone())
        return conv.train(self.training)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        )
        for name, default in (("padding", (0,) * self.dims), ("dilation", (1,) * self.dims), ("groups", 1)):
            if getattr(self, name) != default:
                text += f", {name}={getattr(self, name)!r}"
        if self.padding_mode != "zeros":
            text += f", padding_mode={self.padding_mode!r}"
        return text if self.execution == "auto" else text + f", execution={self.execution!r}"


def _computes_as(module: nn.Module, kind: type[nn.Module]) -> bool:
    """A subclass may pad, standardise or quantise before it convolves; then its weight alone says too little."""
    own = type(module)
    return isinstance(module, kind) and all(
        getattr(own, name) is getattr(kind, name) for name in ("forward", "_conv_forward")
    )


def norm_scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Evaluation-mode batch norm as y = a * x + c: a = gamma / sqrt(var + eps), c = beta - mean * a."""
    if getattr(norm, "running_var", None) is None:
        raise _checks.not_foldable(norm)
    scale = torch.rsqrt(norm.running_var + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    return scale, shift if norm.bias is None else shift + norm.bias
