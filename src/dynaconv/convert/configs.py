"""What to make dynamic, and how: frozen, validated, JSON round-trip."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import nn

from dynaconv import _checks
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.gate_configs import ChannelGate, LayerGate, Narrow, RandomMasking, fill_preset
from dynaconv.convert.granularity import as_granularity
from dynaconv.convert.halting import Halting
from dynaconv.convert.kernel_config import KernelConfig
from dynaconv.convert.kernel_configs import (
    CondConv,
    DCDConv,
    DYConv,
    DyNetConv,
    ODConv,
    WeightNetConv,
)
from dynaconv.nn.mask_unit import INITS, KINDS, MaskUnit
from dynaconv.nn.masked_block import Anatomy
from dynaconv.ops.mask_ops import DILATION_GRADIENTS

# Products for each channel of the squeeze mask unit's window, and how many times those a branch has to take.
_WINDOW, _WORTH = 9, 3
PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"temperature": 1.0, "init": "paper", "dilation_gradient": "none"},
    "default": {"temperature": 2 / 3, "init": "open", "dilation_gradient": "marginal"},
}


@dataclass(frozen=True)
class SpatialMasking(GateConfig):
    """DynConv's spatial masks on residual blocks (arXiv 1912.03203).

    Args:
        preset: "paper" reproduces the publication; "default" is our recommendation. A preset fills the options that
            are left at None: paper has temperature 1, He initialisation, no gradient through dilation; default has
            temperature 2/3, gates that start 88 % open, and the marginal gradient through dilation.
        unit: "squeeze" (classification) or "conv1x1" (pose).
        granularity: one decision for granularity x granularity output positions; a tuple has one number for each
            resolution, finest first.
        temperature: of the straight-through gradient, > 0.
        init: "paper", "default" (PyTorch's) or "open".
        dilation_gradient: "none", "marginal" or "max".
        norm: batch norm inside the mask unit.
    Raises:
        ValueError: an unknown preset, unit, init or gradient; granularity or temperature not positive.

    >>> SpatialMasking(preset="paper").temperature
    1.0
    """

    kind: ClassVar[str] = "spatial_masking"

    preset: str = "default"
    unit: str = "squeeze"
    granularity: int | tuple[int, ...] = 1
    temperature: float | None = None
    init: str | None = None
    dilation_gradient: str | None = None
    norm: bool = False

    def __post_init__(self) -> None:
        fill_preset(self, PRESETS)
        _checks.one_of("mask unit", self.unit, KINDS)
        _checks.one_of("init", self.init, INITS)
        _checks.one_of("dilation_gradient", self.dilation_gradient, DILATION_GRADIENTS)
        _checks.positive("temperature", self.temperature)
        object.__setattr__(self, "granularity", as_granularity(self.granularity))

    def obstacle(self, model: nn.Module, name: str, block: nn.Module, anatomy: Anatomy) -> str | None:
        """Branches with depthwise convolutions so thin that the mask unit's window is more than a third of them.

        Such branches take no less time under a mask at any density that was measured (docs/benchmarks.md).
        """
        if self.unit != "squeeze" or self.granularity != 1:
            return None
        layers = [block.get_submodule(step.conv) for step in anatomy.steps]
        if not any(_is_depthwise(layer) for layer in layers) or not all(type(x) is nn.Conv2d for x in layers):
            return None
        channels = layers[0].in_channels if anatomy.program is None else anatomy.program.in_channels
        work, window = _work(layers), _WINDOW * channels
        if work >= _WORTH * window:
            return None
        return (
            f"its branch takes {work} multiply-adds a position, and the mask unit that would decide for it {window}, "
            'too many for masks to pay; SpatialMasking(unit="conv1x1") has a cheaper one'
        )

    def build_gate(self, in_channels: int, stride: int) -> MaskUnit:
        """A mask unit on the block's output grid."""
        return MaskUnit(
            in_channels,
            kind=self.unit,
            stride=stride,
            granularity_px=self.granularity,
            temperature=self.temperature,
            init=self.init,
            norm=self.norm,
        )

    def describe(self) -> str:
        """Which mask unit, for the conversion report."""
        return f"{self.unit} mask unit"


def _work(layers: Sequence[nn.Conv2d]) -> int:
    """Multiply-adds of all layers of a branch for an output position, those of small depthwise windows taken once.

    Such windows usually stand side by side: the engine merges them, and eager execution of their open rows takes longer
    than all rows of the convolutions, however many those are.
    """
    small = [
        layer.weight.numel()
        for layer in layers
        if _is_depthwise(layer) and math.prod(layer.kernel_size) <= _WINDOW
    ]
    return sum(layer.weight.numel() for layer in layers) - sum(small) + max(small, default=0)


def _is_depthwise(layer: nn.Module) -> bool:
    """One filter a channel."""
    return isinstance(layer, nn.Conv2d) and 1 < layer.groups == layer.in_channels == layer.out_channels


GATE_CONFIGS = (SpatialMasking, LayerGate, Halting, ChannelGate, RandomMasking, Narrow)
CONFIGS: dict[str, type[GateConfig | KernelConfig]] = {
    config.kind: config
    for config in (*GATE_CONFIGS, CondConv, DYConv, DyNetConv, DCDConv, ODConv, WeightNetConv)
}


def config_from_dict(data: dict[str, Any]) -> GateConfig | KernelConfig:
    """The config that `to_dict` wrote.

    Raises:
        ValueError: unknown kind or option.
    """
    data = dict(data)
    kind = data.pop("kind", SpatialMasking.kind)
    _checks.one_of("kind of conversion", kind, tuple(CONFIGS))
    known = [f.name for f in fields(CONFIGS[kind])]
    for name in data:
        if name not in known:
            raise _checks.unknown(f"option of {kind}", name, known)
    return CONFIGS[kind](**data)
