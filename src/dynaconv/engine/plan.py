"""The flat plan in Python: what csrc/plan/plan.h declares, with names and tensors instead of pointers.

A plan is a list of native steps over values (rows [N * h * w, channels], channels-last), cut into segments where
operations run through ATen in between.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dynaconv import _checks

# Order as in csrc/plan/plan.h.
ACTIVATIONS = (
    "none", "relu", "relu6", "silu", "hardswish", "sigmoid", "hardsigmoid", "gelu", "leaky_relu", "tanh", "elu",
    "mish", "gelu_tanh",
)  # fmt: skip
# A leaky ReLU names its slope behind a colon, where that is not 0.01.
_SLOPE, _SLOPE_BITS, _SLOPE_SHIFT = "leaky_relu:", 24, 7
KINDS = (
    "layout", "conv", "stem", "depthwise", "inverted", "max_pool", "avg_pool", "mean", "add", "multiply",
    "activate", "gate", "threshold", "dilate", "mask_value", "layer_norm", "softmax", "copy", "dynamic_conv",
    "channel_fusion", "fusion_factors", "router", "narrow", "resample",
)  # fmt: skip
DTYPES = ("float32", "bfloat16")
NEVER = 2.0
_TENSORS = ("weight", "bias", "winograd")


def leaky_relu(slope: float) -> str | None:
    """The name of a leaky ReLU, None where steps cannot have it as their activation."""
    if math.isclose(slope, 0.01):
        return "leaky_relu"
    return f"{_SLOPE}{float(slope)!r}" if 0 < round(slope * (1 << _SLOPE_BITS)) < 1 << _SLOPE_BITS else None


def slope_of(activation: str) -> float | None:
    """The slope of a leaky ReLU, None of other activations."""
    if activation.startswith(_SLOPE):
        return float(activation.removeprefix(_SLOPE))
    return 0.01 if activation == "leaky_relu" else None


def activation_code(activation: str) -> int:
    """The number of csrc/plan/plan.h."""
    slope = slope_of(activation)
    if slope is None or activation in ACTIVATIONS:
        return ACTIVATIONS.index(activation)
    steps = min(max(round(slope * (1 << _SLOPE_BITS)), 1), (1 << _SLOPE_BITS) - 1)
    return ACTIVATIONS.index("leaky_relu") + (steps << _SLOPE_SHIFT)


@dataclass
class Value:
    """One matrix of rows.

    `storage` names the memory it lives in: values computed in place share one, and so do values that are some channels
    of the same rows, from `first` on.
    """

    height: int
    width: int
    channels: int
    stride: int
    storage: int
    dtype: str = "float32"
    external: int = -1
    offset: int = 0
    name: str = ""
    first: int = 0

    @property
    def size(self) -> tuple[int, int]:
        """The grid (h, w)."""
        return self.height, self.width

    @property
    def place(self) -> tuple[int, int]:
        """Where it lies: values with the same place are computed in place."""
        return self.storage, self.first


@dataclass
class Conv:
    """Geometry and packed weights; `form` says how `weight` is packed (see pack.py), "none" for pooling."""

    form: str
    in_channels: int
    out_channels: int
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    weight: Tensor | None = None
    bias: Tensor | None = None
    winograd: Tensor | None = None


@dataclass
class Grid:
    """A mask on one grid; `gate` names the gate whose decision it holds, "" for those derived from others."""

    height: int
    width: int
    closed: int = 0
    tiles: int = 0
    gate: str = ""


@dataclass
class Step:
    """One native call; fields as in plan.h, plus the module path that it came from."""

    kind: str
    input: int = -1
    input2: int = -1
    out: int = -1
    conv: list[int] = field(default_factory=lambda: [-1, -1, -1])
    activation: list[str] = field(default_factory=lambda: ["none", "none", "none"])
    final_activation: str = "none"
    grid: int = -1
    grid2: int = -1
    closed: int = 0
    run_all_above: float = NEVER
    aux: list[int] = field(default_factory=lambda: [-1] * 4)
    ints: list[int] = field(default_factory=lambda: [0] * 8)
    floats: list[float] = field(default_factory=lambda: [0.0] * 4)
    layer: str = ""


@dataclass
class AtenStep:
    """One operation that PyTorch runs; `args` and `kwargs` are trees of plain values and references (see aten.py)."""

    target: str
    args: Any
    kwargs: Any
    out: int
    layer: str = ""
    reason: str = ""
    frees: list[int] = field(default_factory=list)


@dataclass
class External:
    """A value outside of the arena.

    source: "input" (the image), "slot" (result of an ATen step) or "made" (allocated for a call).
    """

    value: int
    source: str
    slot: int = -1
    layout: str = "nchw"


@dataclass
class Segment:
    """Native steps [first, last), or the ATen step `aten` when it is not -1."""

    first: int = 0
    last: int = 0
    aten: int = -1


@dataclass
class GateInfo:
    """What a gate brings: its grid, the step that decides, its table of budgets, what one decision is about.

    dial: the step's number is the gate's threshold, so that it can be turned.
    """

    name: str
    grid: int
    step: int
    budgets: list[list[float]] = field(default_factory=list)
    scope: str = "position"
    dial: bool = True


@dataclass
class Plan:
    """Everything that a forward needs, for images of one size; `dtype` is that of feature maps and weights."""

    image: tuple[int, int, int] = (0, 0, 0)
    values: list[Value] = field(default_factory=list)
    convs: list[Conv] = field(default_factory=list)
    grids: list[Grid] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    aten: list[AtenStep] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    externals: list[External] = field(default_factory=list)
    gates: list[GateInfo] = field(default_factory=list)
    fixed_gates: list[str] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    out_spec: str = ""
    constants: dict[str, Any] = field(default_factory=dict)
    slots: int = 1
    inputs: int = 1
    arena_bytes: int = 0
    batch: int | None = None
    dtype: str = "float32"
    measured: dict[str, dict[str, float]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Everything but tensors; `tensors` has those."""
        data = {k: v for k, v in asdict_shallow(self).items() if k not in ("convs", "constants")}
        data["convs"] = [{k: v for k, v in vars(c).items() if k not in _TENSORS} for c in self.convs]
        return data

    def tensors(self) -> dict[str, Tensor]:
        """Weights by the name that `from_json` expects."""
        found = {f"conv.{i}.{k}": t for i, c in enumerate(self.convs) for k in _TENSORS
                 if (t := getattr(c, k)) is not None}  # fmt: skip
        for name, value in self.constants.items():
            if not isinstance(value, Tensor):
                raise _checks.engine_not_storable(name, value)
            found[f"constant.{name}"] = value.contiguous()
        return found

    @classmethod
    def from_json(cls, data: dict[str, Any], tensors: dict[str, Tensor]) -> Plan:
        """Inverse of `to_json` and `tensors`; KeyError or TypeError when something is missing."""
        data = dict(data)
        kinds = {"values": Value, "convs": Conv, "grids": Grid, "steps": Step, "aten": AtenStep,
                 "segments": Segment, "externals": External, "gates": GateInfo}  # fmt: skip
        for name, kind in kinds.items():
            data[name] = [kind(**row) for row in data[name]]
        for i, conv in enumerate(data["convs"]):
            for name in _TENSORS:
                setattr(conv, name, tensors.get(f"conv.{i}.{name}"))
            conv.kernel, conv.stride = tuple(conv.kernel), tuple(conv.stride)
            conv.padding, conv.dilation = tuple(conv.padding), tuple(conv.dilation)
        data["image"] = tuple(data["image"])
        data["constants"] = {k[9:]: v for k, v in tensors.items() if k.startswith("constant.")}
        return cls(**data)


def asdict_shallow(plan: Plan) -> dict[str, Any]:
    """Fields as plain values, tensors left out."""
    lists = ("values", "grids", "steps", "aten", "segments", "externals", "gates")
    return {k: [asdict(row) for row in v] if k in lists else v for k, v in vars(plan).items()}


def element_size(dtype: str) -> int:
    """Bytes of one element."""
    return torch.empty((), dtype=getattr(torch, dtype)).element_size()
