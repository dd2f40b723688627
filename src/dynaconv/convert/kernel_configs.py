"""Which dynamic kernel a convolution becomes: one frozen config a method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dynaconv import _checks
from dynaconv.convert.kernel_config import KernelConfig, Place
from dynaconv.nn.condconv import CondConv1d, CondConv2d, CondConv3d, CondLinear
from dynaconv.nn.dcd import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear
from dynaconv.nn.dyconv import DYConv1d, DYConv2d, DYConv3d
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.dynet import DyNetConv1d, DyNetConv2d, DyNetConv3d
from dynaconv.nn.odconv import ODConv1d, ODConv2d, ODConv3d
from dynaconv.nn.routers import ChannelRouter, SigmoidRouter
from dynaconv.nn.weightnet import WeightNetConv1d, WeightNetConv2d, WeightNetConv3d, WeightNetRouter


@dataclass(frozen=True)
class CondConv(KernelConfig):
    """Convolutions become sums of experts weighted by sigmoids (arXiv 1904.04971).

    Args:
        num_experts: K >= 1.
        routing: "block" (as published: one router for all convolutions of a block) or "layer".
        noise: what separates the experts at the start, relative to the weight's standard deviation.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.

    >>> CondConv(num_experts=4).describe()
    'condconv, 4 experts, a router a block'
    """

    kind: ClassVar[str] = "condconv"
    layers: ClassVar[dict] = {nn.Conv1d: CondConv1d, nn.Conv2d: CondConv2d, nn.Conv3d: CondConv3d}

    num_experts: int = 8
    scope: str = "paper"
    routing: str = "block"
    init: str = "exact"
    noise: float = 0.1
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """num_experts >= 1, routing known."""
        _checks.count("num_experts", self.num_experts)
        _checks.one_of("routing", self.routing, ("block", "layer"))

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """A CondConv layer."""
        return self.layer_for(conv).from_conv(
            conv,
            num_experts=self.num_experts,
            init=self.init,
            noise=self.noise,
            router=not shared,
            execution=self.execution,
        )

    def convert_linear(self, linear: nn.Linear, place: Place) -> nn.Module:
        """A CondConv classifier."""
        return CondLinear.from_linear(linear, num_experts=self.num_experts, init=self.init, noise=self.noise)

    def block_router(self, in_channels: int, layers: Sequence[DynamicConv], place: Place) -> nn.Module:
        """sigmoid(linear(GAP(block input)))."""
        weight = layers[0].weight
        router = SigmoidRouter(in_channels, self.num_experts, device=weight.device, dtype=weight.dtype)
        if self.init == "exact":
            router.make_neutral_()
        return router

    def describe(self) -> str:
        """Experts and routing."""
        return f"condconv, {self.num_experts} experts, a router a {self.routing}"


@dataclass(frozen=True)
class DYConv(KernelConfig):
    """Convolutions become convex sums of kernels, weighted by attention (arXiv 1912.03458).

    Args:
        num_kernels: K >= 1. reduction: hidden width of the attention relative to the input channels.
        temperature: of the softmax at the start; anneal it with `TemperatureSchedule`.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.
    """

    kind: ClassVar[str] = "dyconv"
    layers: ClassVar[dict] = {nn.Conv1d: DYConv1d, nn.Conv2d: DYConv2d, nn.Conv3d: DYConv3d}

    num_kernels: int = 4
    reduction: float = 1 / 4
    temperature: float = 1.0
    scope: str = "paper"
    init: str = "exact"
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """num_kernels >= 1, reduction and temperature positive."""
        _checks.count("num_kernels", self.num_kernels)
        _checks.positive("reduction", self.reduction)
        _checks.positive("temperature", self.temperature)

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """A DY-Conv layer with attention of its own."""
        return self.layer_for(conv).from_conv(
            conv,
            num_kernels=self.num_kernels,
            reduction=self.reduction,
            temperature=self.temperature,
            init=self.init,
            execution=self.execution,
        )

    def describe(self) -> str:
        """Number of kernels."""
        return f"dyconv, {self.num_kernels} kernels"


@dataclass(frozen=True)
class DyNetConv(KernelConfig):
    """Every output channel mixes experts of its own, one predictor a block (arXiv 2004.10694).

    Args:
        group_size: g_t >= 1, experts of one output channel.
        routing: "block" (as published) or "layer".
        predictor: "paper" (two linear layers in ResNets, MobileNetV3 and EfficientNet, one elsewhere), "one" or "two".
        noise: what separates the experts at the start, relative to the weight's standard deviation.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.
    """

    kind: ClassVar[str] = "dynet"
    layers: ClassVar[dict] = {nn.Conv1d: DyNetConv1d, nn.Conv2d: DyNetConv2d, nn.Conv3d: DyNetConv3d}

    group_size: int = 6
    scope: str = "paper"
    routing: str = "block"
    predictor: str = "paper"
    init: str = "exact"
    noise: float = 0.1
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """group_size >= 1, routing and predictor known."""
        _checks.count("group_size", self.group_size)
        _checks.one_of("routing", self.routing, ("block", "layer"))
        _checks.one_of("predictor", self.predictor, ("paper", "one", "two"))

    def hidden(self, in_channels: int, place: Place) -> int | None:
        """Width between the predictor's two linear layers, None for one layer."""
        if self.predictor == "one":
            return None
        if place.family == "resnet":
            return max(1, in_channels // 4)
        if self.predictor == "two" or place.family in ("mobilenetv3", "efficientnet"):
            return max(8, in_channels // 4)
        return None

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """A DyNet layer."""
        return self.layer_for(conv).from_conv(
            conv,
            group_size=self.group_size,
            hidden=self.hidden(conv.in_channels, place),
            init=self.init,
            noise=self.noise,
            router=not shared,
            execution=self.execution,
        )

    def block_router(self, in_channels: int, layers: Sequence[DynamicConv], place: Place) -> nn.Module:
        """One predictor for all coefficients of the block."""
        weight, hidden = layers[0].weight, self.hidden(in_channels, place)
        router = ChannelRouter(
            in_channels, [layer.out_channels for layer in layers], self.group_size, hidden,
            device=weight.device, dtype=weight.dtype,
        )  # fmt: skip
        if self.init == "exact":
            router.make_neutral_()
        return router

    def describe(self) -> str:
        """Group size and routing."""
        return f"dynet, {self.group_size} experts a channel, a predictor a {self.routing}"


@dataclass(frozen=True)
class DCDConv(KernelConfig):
    """Convolutions get a dynamic channel fusion over few latent channels (arXiv 2103.08756).

    Args:
        fc_squeeze: what the width of the predictor is divided by (16 in the published networks).
        latent_channels, squeeze_channels, pool_size: None takes the published rule for the network's family.
        norm: "batch" or "none", inside the fusion. form: "auto", "factored" or "folded" evaluation.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.
    """

    kind: ClassVar[str] = "dcd"
    layers: ClassVar[dict] = {nn.Conv1d: DCDConv1d, nn.Conv2d: DCDConv2d, nn.Conv3d: DCDConv3d}

    fc_squeeze: int = 16
    latent_channels: int | None = None
    squeeze_channels: int | None = None
    pool_size: int | None = None
    norm: str = "batch"
    form: str = "auto"
    scope: str = "paper"
    init: str = "exact"
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """Sizes >= 1, norm and form known."""
        for name in ("fc_squeeze", "latent_channels", "squeeze_channels", "pool_size"):
            if getattr(self, name) is not None:
                _checks.count(name, getattr(self, name))
        _checks.one_of("norm", self.norm, ("batch", "none"))
        _checks.one_of("form", self.form, ("auto", "factored", "folded"))

    @staticmethod
    def rule(place: Place) -> str:
        """Which published rule sets the sizes."""
        if place.family == "resnet":
            return "resnet_bottleneck" if place.bottleneck else "resnet_basic"
        return "mobilenetv2"

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """A DCD layer."""
        return self.layer_for(conv).from_conv(
            conv,
            init=self.init,
            rule=self.rule(place),
            fc_squeeze=self.fc_squeeze,
            latent_channels=self.latent_channels,
            squeeze_channels=self.squeeze_channels,
            pool_size=self.pool_size,
            norm=self.norm,
            form=self.form,
            execution=self.execution,
        )

    def convert_linear(self, linear: nn.Linear, place: Place) -> nn.Module:
        """DCD's dynamic classifier, 32 latent channels."""
        return DCDLinear.from_linear(linear, init=self.init, norm=self.norm, rule=self.rule(place))


@dataclass(frozen=True)
class ODConv(KernelConfig):
    """Attention over taps, input channels, output channels and kernels (arXiv 2209.07947).

    Args:
        num_kernels: K >= 1; 1 and 4 are published.
        reduction, min_channels: width of the attention's trunk, max(int(reduction * I), min_channels).
        temperature: of all attentions at the start; anneal it with `TemperatureSchedule`.
        norm: "batch" (as published), "layer" or "none", in the trunk.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.
    """

    kind: ClassVar[str] = "odconv"
    layers: ClassVar[dict] = {nn.Conv1d: ODConv1d, nn.Conv2d: ODConv2d, nn.Conv3d: ODConv3d}

    num_kernels: int = 1
    reduction: float = 1 / 16
    min_channels: int = 16
    temperature: float = 1.0
    norm: str = "batch"
    scope: str = "paper"
    init: str = "exact"
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """Sizes, reduction and temperature positive, norm known."""
        _checks.count("num_kernels", self.num_kernels)
        _checks.count("min_channels", self.min_channels)
        _checks.positive("reduction", self.reduction)
        _checks.positive("temperature", self.temperature)
        _checks.one_of("norm", self.norm, ("batch", "layer", "none"))

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """An ODConv layer with attention of its own."""
        return self.layer_for(conv).from_conv(
            conv,
            num_kernels=self.num_kernels,
            reduction=self.reduction,
            min_channels=self.min_channels,
            temperature=self.temperature,
            norm=self.norm,
            init=self.init,
            execution=self.execution,
        )

    def describe(self) -> str:
        """Number of kernels."""
        return f"odconv, {self.num_kernels} kernel{'s' * (self.num_kernels > 1)}"


@dataclass(frozen=True)
class WeightNetConv(KernelConfig):
    """Kernels are generated from a few coefficients; a block shares one reduction (arXiv 2007.11823).

    Args:
        num_coefficients, num_blocks: M and G of every layer.
        reduction, min_channels: width of the reduction, max(int(I * reduction), min_channels).
        routing: "block" (as published) or "layer".
        noise: what separates the coefficients' weights at the start, relative to the weight's standard deviation.
        scope, init, execution, first_block, head, classifier: see `KernelConfig`.
    Raises:
        ValueError: an option out of range.
    """

    kind: ClassVar[str] = "weightnet"
    layers: ClassVar[dict] = {
        nn.Conv1d: WeightNetConv1d,
        nn.Conv2d: WeightNetConv2d,
        nn.Conv3d: WeightNetConv3d,
    }

    num_coefficients: int = 2
    num_blocks: int = 2
    reduction: float = 1 / 16
    min_channels: int = 16
    scope: str = "paper"
    routing: str = "block"
    init: str = "exact"
    noise: float = 0.1
    execution: str = "auto"
    first_block: str | int | None = None
    head: bool | None = None
    classifier: bool | None = None

    def check(self) -> None:
        """Sizes >= 1, routing known."""
        for name in ("num_coefficients", "num_blocks", "min_channels"):
            _checks.count(name, getattr(self, name))
        _checks.positive("reduction", self.reduction)
        _checks.one_of("routing", self.routing, ("block", "layer"))

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """A WeightNet layer."""
        return self.layer_for(conv).from_conv(
            conv,
            num_coefficients=self.num_coefficients,
            num_blocks=self.num_blocks,
            reduction=self.reduction,
            min_channels=self.min_channels,
            init=self.init,
            noise=self.noise,
            router=not shared,
            execution=self.execution,
        )

    def block_router(self, in_channels: int, layers: Sequence[DynamicConv], place: Place) -> nn.Module:
        """One reduction for the block, and a linear layer for each of its layers."""
        weight = layers[0].weight
        sizes = [layer.routing_shape[0] for layer in layers]
        router = WeightNetRouter(
            in_channels, sizes, self.reduction, self.min_channels, device=weight.device, dtype=weight.dtype
        )
        if self.init == "exact":
            router.make_neutral_()
        return router
