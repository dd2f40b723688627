"""What a masked branch consists of: convolutions, and what happens to rows between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dynaconv.export.graph import attribute, constant
from dynaconv.export.regions import Joined, PerImage, Pooled, Region, Squeeze

# Row by row, without a look at other positions.
UNARY = (
    "Relu",
    "Clip",
    "Sigmoid",
    "HardSwish",
    "HardSigmoid",
    "LeakyRelu",
    "Tanh",
    "Elu",
    "Gelu",
    "Softplus",
    "Mish",
    "Selu",
    "Celu",
    "PRelu",
)


@dataclass(frozen=True, eq=False)
class Pointwise:
    """What happens to each row by itself: one node, or a SiLU of two; `value` is what goes in."""

    node: Any
    silu: bool = False

    @property
    def nodes(self) -> list[Any]:
        """The nodes that it stands for."""
        return [self.node, *(v.producer() for v in self.node.inputs if self.silu and is_sigmoid(v))]


Step = Pointwise | PerImage | Region | Squeeze | Joined


@dataclass(eq=False)
class Stage:
    """One convolution with constant weights, and what follows it row by row."""

    conv: Any
    after: list[Step]

    @property
    def weight(self) -> Any:
        """[O, I / groups, kh, kw]."""
        return constant(self.conv.inputs[1])

    @property
    def bias(self) -> Any:
        """[O] or None."""
        return constant(self.conv.inputs[2]) if len(self.conv.inputs) > 2 else None

    @property
    def groups(self) -> int:
        """Of the convolution."""
        return attribute(self.conv, "group", 1)

    @property
    def inputs(self) -> int:
        """Channels of the map that it reads."""
        return self.weight.shape[1] * self.groups

    @property
    def stride(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return tuple(attribute(self.conv, "strides", (1, 1)))

    @property
    def dilation(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return tuple(attribute(self.conv, "dilations", (1, 1)))

    @property
    def pads(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right)."""
        return tuple(attribute(self.conv, "pads", (0, 0, 0, 0)))

    @property
    def kernel(self) -> tuple[int, int]:
        """(vertical, horizontal)."""
        return tuple(self.weight.shape[2:])

    @property
    def taps(self) -> int:
        """Positions that it reads for each output."""
        return int(np.prod(self.kernel))

    @property
    def pointwise(self) -> bool:
        """Output position p reads input position p and nothing else."""
        return self.kernel == (1, 1) == self.stride and not any(self.pads)

    @property
    def centred(self) -> bool:
        """Output position p reads input position p in the middle of its window."""
        reach = [d * (k - 1) for k, d in zip(self.kernel, self.dilation, strict=True)]
        even = any(r % 2 for r in reach) or any(k % 2 == 0 for k in self.kernel)
        return not even and self.stride == (1, 1) and self.pads == tuple(r // 2 for r in (*reach, *reach))

    @property
    def depthwise(self) -> bool:
        """One filter a channel."""
        return self.groups > 1 and self.weight.shape[:2] == (self.groups, 1)


@dataclass(eq=False)
class RoutedStage(Stage):
    """A convolution that depends on the image; `conv` is a node of our own.

    pooled: the mean of the map that it reads, where its router asks for that of the open positions.
    """

    pooled: Pooled | None = None

    @property
    def decided(self) -> Any:
        """What its router decides."""
        return self.conv.inputs[1]


@dataclass(eq=False)
class ComputedStage(RoutedStage):
    """A convolution with a kernel for each image; see `computed`."""

    @property
    def kernels(self) -> Any:
        """[N, O, I / groups, kh, kw]."""
        return self.conv.inputs[1]

    @property
    def experts(self) -> Any:
        """[E, O, I / groups, kh, kw]: what kernels are mixed from."""
        return self.conv.inputs[2]

    @property
    def routing(self) -> Any:
        """How kernels are mixed: [N, E], or [N, O, E]."""
        return self.conv.inputs[3]

    @property
    def attention(self) -> Any:
        """[N, kh * kw], which scales the taps of the mixed kernel, or None."""
        return self.conv.inputs[4]

    @property
    def by_channel(self) -> bool:
        """Every output channel has coefficients of its own."""
        return len(self.routing.shape) == 3

    @property
    def single(self) -> bool:
        """There is one expert, which each image scales as a whole or tap by tap."""
        return self.experts.shape[0] == 1 and not self.by_channel

    @property
    def weight(self) -> Any:
        """Zeros in the shape of one kernel."""
        return np.broadcast_to(np.float32(0), tuple(self.kernels.shape)[1:])

    @property
    def bias(self) -> Any:
        """None: it is added behind."""
        return None


@dataclass(eq=False)
class FusedStage(RoutedStage):
    """A convolution with constant weights and dynamic channel fusion beside it; see `fused`."""

    @property
    def decided(self) -> Any:
        """The fusion matrix."""
        return self.fusion

    @property
    def q(self) -> Any:
        """[L, C]."""
        return _matrix(self.conv.inputs[3])

    @property
    def p(self) -> Any:
        """[O, L]."""
        return _matrix(self.conv.inputs[4])

    @property
    def scale(self) -> Any:
        """[N, O]."""
        return self.conv.inputs[5]

    @property
    def fusion(self) -> Any:
        """[N, L, L]."""
        return self.conv.inputs[6]

    @property
    def norms(self) -> list[tuple[Any, Any]]:
        """Scale and shift, [L] or None, behind q and behind the fusion matrix."""
        parts = [constant(value) for value in self.conv.inputs[7:11]]
        return [(parts[0], parts[1]), (parts[2], parts[3])]


def _matrix(value: Any) -> Any:
    array = constant(value)
    return array.reshape(array.shape[:2])


def is_unary(node: Any) -> bool:
    """An activation whose parameters, if it has any, are constants: numbers, or one for each channel."""
    if node is None or node.op_type not in UNARY:
        return False
    if node.op_type == "PRelu":
        return _for_channels(constant(node.inputs[1]))
    return all(v is None or constant(v) is not None for v in node.inputs[1:])


def is_static_conv(node: Any) -> bool:
    """A 2-d convolution with constant weights and numeric padding."""
    if (
        node is None
        or node.op_type != "Conv"
        or attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", b"NOTSET")
    ):
        return False
    weight = constant(node.inputs[1])
    bias = len(node.inputs) < 3 or node.inputs[2] is None or constant(node.inputs[2]) is not None
    return weight is not None and weight.ndim == 4 and bias


def channel_constant(node: Any) -> int | None:
    """Which input of a Mul or Add is a constant for each channel of a map (or one number), or None."""
    if node is None or node.op_type not in ("Mul", "Add", "Sub", "Div"):
        return None
    for i in (1, 0) if node.op_type in ("Mul", "Add") else (1,):
        array, other = constant(node.inputs[i]), node.inputs[1 - i]
        if array is None or other.shape is None or len(other.shape) != 4:
            continue
        if _for_channels(array) and array.size in (1, other.shape[1]):
            return i
    return None


def _for_channels(array: Any) -> bool:
    """One number, or one for each channel of a map [N, C, h, w]."""
    shape = () if array is None or array.ndim > 4 else (1,) * (4 - array.ndim) + array.shape
    return bool(shape) and shape[0] == shape[2] == shape[3] == 1


def nodes_of(step: Step) -> list[Any]:
    """The nodes that a step stands for."""
    return step.inner if isinstance(step, Region) else step.nodes


def is_sigmoid(value: Any) -> bool:
    """What a sigmoid made."""
    return value is not None and value.producer() is not None and value.producer().op_type == "Sigmoid"
