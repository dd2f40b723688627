"""Gates other than spatial masks: what DynConv is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from dynaconv import _checks
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.granularity import as_granularity
from dynaconv.nn.channel_block import ChannelBlock, channel_groups, channel_obstacle, conv_share
from dynaconv.nn.channel_unit import ChannelUnit, WidthUnit
from dynaconv.nn.gate import Gate
from dynaconv.nn.layer_unit import LayerUnit
from dynaconv.nn.masked_block import Anatomy, MaskedBlock
from dynaconv.nn.random_unit import RandomUnit, seed_of
from dynaconv.ops.mask_ops import DILATION_GRADIENTS

TEMPERATURES = {"paper": 1.0, "default": 2 / 3}


def fill_preset(config: Any, presets: dict[str, dict[str, Any]]) -> None:
    """Fill the options that a frozen config leaves at None from its preset.

    Raises:
        ValueError: an unknown preset.
    """
    _checks.one_of("preset", config.preset, tuple(presets))
    for name, value in presets[config.preset].items():
        if getattr(config, name) is None:
            object.__setattr__(config, name, value)


@dataclass(frozen=True)
class LayerGate(GateConfig):
    """ConvNet-AIG: every residual block decides for each image whether it runs at all (arXiv 1711.11503).

    Args:
        preset: "paper" (temperature 1) or "default" (2/3).
        hidden: width of the layer between the average and the two scores.
        temperature: of the straight-through gradient, > 0.
    Raises:
        ValueError: an unknown preset; hidden below 1 or temperature not positive.

    >>> import dynaconv as dc
    >>> len(dc.dynamize_(dc.create_model("resnet8_cifar"), LayerGate()).converted)
    3
    """

    kind: ClassVar[str] = "layer_gate"
    dilation_gradient: ClassVar[str | None] = "none"

    preset: str = "default"
    hidden: int = 16
    temperature: float | None = None

    def __post_init__(self) -> None:
        fill_preset(self, {name: {"temperature": value} for name, value in TEMPERATURES.items()})
        _checks.count("hidden", self.hidden)
        _checks.positive("temperature", self.temperature)

    def build_gate(self, in_channels: int, stride: int) -> LayerUnit:
        """A gate for the block."""
        return LayerUnit(in_channels, stride=stride, hidden=self.hidden, temperature=self.temperature)

    def describe(self) -> str:
        """For the conversion report."""
        return "layer gate"


class _ChannelConfig(GateConfig):
    """Configs whose gate decides over hidden channels instead of positions."""

    dilation_gradient: ClassVar[str | None] = "none"
    groups: int

    def obstacle(self, model: nn.Module, name: str, block: nn.Module, anatomy: Anatomy) -> str | None:
        """Branches whose hidden maps do not share their channels, or that have more than convolutions in them."""
        if anatomy.program is not None:
            return (
                "channel gates need a branch of convolutions, batch norms and activations in a row, "
                "all of them modules such as nn.ReLU, not functions such as F.relu"
            )
        return channel_obstacle([block.get_submodule(step.conv) for step in anatomy.steps])

    def wrap(self, block: nn.Module, anatomy: Anatomy, name: str) -> MaskedBlock:
        """The block with a gate over as many groups as divide its hidden channels."""
        masked = ChannelBlock(block, anatomy, nn.Identity(), config=self)
        reference = masked.convs[0].weight
        gate = self.build_channel_gate(masked.convs, channel_groups(masked.convs, self.groups), name)
        masked.gate = gate.to(reference.device, reference.dtype).train(masked.training)
        return masked

    def build_channel_gate(self, convs: list[nn.Module], groups: int, name: str) -> Gate:
        """A gate over `groups` groups of hidden channels."""
        raise TypeError(f"{type(self).__name__} must implement build_channel_gate(convs, groups, name)")


@dataclass(frozen=True)
class ChannelGate(_ChannelConfig):
    """Channel skipping: every residual block decides for each image which groups of hidden channels it computes.

    Args:
        groups: most groups in a block; the largest number that divides its hidden channels is taken.
        hidden: width of the layer between the average and the scores; None takes max(groups // 16, 16).
        temperature: of the straight-through gradient, > 0.
        open_bias: logit at the start; 2 means 88 % open.
    Raises:
        ValueError: groups or hidden below 1, temperature not positive.
    Source: the channel mode of LAUDNet, arXiv 2308.15949.

    >>> import dynaconv as dc
    >>> model = dc.create_model("resnet8_cifar")
    >>> dc.dynamize_(model, ChannelGate(groups=4)).converted
    ['layer1.0', 'layer2.0', 'layer3.0']
    """

    kind: ClassVar[str] = "channel_gate"

    groups: int = 8
    hidden: int | None = None
    temperature: float = 2 / 3
    open_bias: float = 2.0

    def __post_init__(self) -> None:
        _checks.count("groups", self.groups)
        if self.hidden is not None:
            _checks.count("hidden", self.hidden)
        _checks.positive("temperature", self.temperature)

    def build_channel_gate(self, convs: list[nn.Module], groups: int, name: str) -> ChannelUnit:
        """A gate for the block."""
        return ChannelUnit(
            convs[0].in_channels,
            groups=groups,
            hidden=self.hidden,
            temperature=self.temperature,
            open_bias=self.open_bias,
        )

    def describe(self) -> str:
        """For the conversion report."""
        return f"channel gate, up to {self.groups} groups"


@dataclass(frozen=True)
class Narrow(_ChannelConfig):
    """A static narrower network as a control: the same hidden channels are left out for every image.

    Args:
        budget: share of each block's multiply-adds to keep; the number of channels that comes nearest is taken, and
            `calibrate_` then turns all blocks together.
        groups: most groups in a block; left as it is, single channels.
    Raises:
        ValueError: budget outside (0, 1], groups below 1.

    >>> import dynaconv as dc
    >>> model = dc.create_model("resnet8_cifar")
    >>> report = dc.dynamize_(model, Narrow(budget=0.5))
    >>> round(dc.profile(model, torch.randn(1, 3, 32, 32)).conditional_ratio, 2)
    0.5
    """

    kind: ClassVar[str] = "narrow"

    budget: float = 0.5
    groups: int = 4096

    def __post_init__(self) -> None:
        _checks.fraction("budget", self.budget)
        _checks.count("groups", self.groups)

    def build_channel_gate(self, convs: list[nn.Module], groups: int, name: str) -> WidthUnit:
        """As many of the first channels as fit the budget."""
        kept = torch.arange(1, groups + 1, dtype=torch.float64) / groups
        macs = [conv.weight.numel() for conv in convs]
        shares = sum(
            conv_share(i, conv, len(convs) - 1, kept) * macs[i] for i, conv in enumerate(convs)
        ) / sum(macs)
        best = int((shares - self.budget).abs().argmin())
        return WidthUnit(groups, keep=float(kept[best]), phase=(seed_of(name) % 997) / 997)

    def describe(self) -> str:
        """For the conversion report."""
        return f"{self.budget:g} of its MACs for every image"


@dataclass(frozen=True)
class RandomMasking(GateConfig):
    """Spatial masks at random positions as a control; their density is learned from the budget alone.

    Args:
        granularity: one decision for granularity x granularity output positions; a tuple has one number for each
            resolution, finest first.
        temperature: of the straight-through gradient, > 0.
        dilation_gradient: "none", "marginal" or "max".
        seed: of the positions in evaluation.
    Raises:
        ValueError: granularity below 1, temperature not positive, an unknown gradient.

    >>> import dynaconv as dc
    >>> len(dc.dynamize_(dc.create_model("resnet8_cifar"), RandomMasking()).converted)
    3
    """

    kind: ClassVar[str] = "random_masking"

    granularity: int | tuple[int, ...] = 1
    temperature: float = 2 / 3
    dilation_gradient: str = "marginal"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "granularity", as_granularity(self.granularity))
        _checks.positive("temperature", self.temperature)
        _checks.one_of("dilation_gradient", self.dilation_gradient, DILATION_GRADIENTS)

    def wrap(self, block: nn.Module, anatomy: Anatomy, name: str) -> MaskedBlock:
        """The block with a gate whose positions follow from the block's name."""
        masked = super().wrap(block, anatomy, name)
        masked.gate.seed = seed_of(name, self.seed)
        return masked

    def build_gate(self, in_channels: int, stride: int) -> RandomUnit:
        """A gate for a block of this stride."""
        return RandomUnit(stride=stride, granularity_px=self.granularity, temperature=self.temperature)

    def describe(self) -> str:
        """For the conversion report."""
        return "random masks"
