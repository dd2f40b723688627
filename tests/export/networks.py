"""Small members of every family, with masks as inputs, exported once and lowered in both ways."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from tests.convert.families import BLOCKS as FAMILY_BLOCKS
from tests.convert.families import timm_block, timm_se
from tests.convert.networks import _BLOCKS, randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.testing import MaskInputs, forced

SIZE = (3, 13, 11)
SIZES = {"hourglass": (3, 32, 32)}
# Where another size than the traced one is asked; an hourglass halves its map five times.
OTHER_SIZES = {"hourglass": (3, 64, 32)}


def _timm_layer(name: str) -> type[nn.Module]:
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm import layers

    return getattr(layers, name)


MORE_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "regnet": lambda: timm_block("regnet.Bottleneck", 8, 8, bottle_ratio=1, group_size=4, se_ratio=0.25),
    "mobilenetv3": lambda: timm_block(
        "_efficientnet_blocks.InvertedResidual", 6, 6, exp_ratio=2.0, act_layer=nn.Hardswish, se_layer=timm_se
    ),
    "eca": lambda: timm_block("resnet.BasicBlock", 8, 8, attn_layer=_timm_layer("EcaModule")),
    "preact": lambda: timm_block(
        "resnetv2.PreActBottleneck",
        8,
        conv_layer=_timm_layer("StdConv2d"),
        norm_layer=_timm_layer("BatchNormAct2d"),
    ),
    "repvgg": lambda: timm_block("byobnet.RepVggBlock", 8, 8, group_size=2),
    "mobileone": lambda: timm_block("byobnet.MobileOneBlock", 8, 8, kernel_size=1, num_conv_branches=2),
    "ghost": lambda: timm_block("ghostnet.GhostBottleneck", 16, 24, 16, se_ratio=0.25),
    "repghost": lambda: timm_block("repghost.RepGhostBottleneck", 8, 12, 8),
    "norm-free": lambda: timm_block("nfnet.NormFreeBlock", 8, 8, group_size=2, reg=False, act_layer=nn.ReLU),
}


class Mixed(nn.Module):
    """A branch of every kind of convolution: even and strided windows, groups, one filter a channel, dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(8, 12, 3, 2, padding=1), nn.Conv2d(12, 12, 2, padding=1, groups=4)
        self.conv3 = nn.Conv2d(12, 12, 3, padding=2, dilation=2, groups=12, bias=False)
        self.conv4, self.norm = nn.Conv2d(12, 8, 2, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.Conv2d(8, 8, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.conv1(x).relu()).relu()
        return (self.pool(x) + self.norm(self.conv4(self.conv3(y).relu()))).relu()


class Gelu(nn.Module):
    """Hidden maps in groups from the first convolution on, which a channel gate may part."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.act1 = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.GELU()
        self.conv2, self.act2 = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.SiLU()
        self.conv3, self.act = nn.Conv2d(8, 8, 1), nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.conv3(self.act2(self.conv2(self.act1(self.conv1(x))))))


OWN_BLOCKS: dict[str, Callable[[], nn.Module]] = {"mixed": Mixed, "gelu": Gelu}


def _chain(*kinds: str, kernels: object = None, gate: object = None, **options) -> nn.Module:
    """A stem, masked blocks of several kinds with something dense between them, and a head."""
    parts, channels = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()], 6
    for kind in kinds:
        block = (_BLOCKS | FAMILY_BLOCKS | MORE_BLOCKS | OWN_BLOCKS)[kind]()
        first = next(m for m in block.modules() if isinstance(m, nn.Conv2d))
        inside = 48 if kind == "shuffle" else first.in_channels
        parts += [nn.Conv2d(channels, inside, 1), nn.ReLU(), block]
        channels = {"basic_s2": 10, "bottleneck with se": 12, "blurred": 8, "two additions": 8}.get(
            kind, inside
        )
    parts += [nn.Conv2d(channels, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5)]
    model = nn.Sequential(*parts)
    randomise_norms(model)
    if kernels is not None:
        dc.dynamize_(model, kernels)
    dc.dynamize_(model, dc.SpatialMasking(preset="paper", **options) if gate is None else gate)
    return model


def _hourglass() -> nn.Module:
    model = dc.create_model("hourglass1_scenes", width=8, depth=1, image_size=32)
    randomise_norms(model)
    dc.dynamize_(model, dc.SpatialMasking(preset="paper"))
    return model


def _cifar(config: object, depth: int = 8) -> nn.Module:
    model = dc.create_model(f"resnet{depth}_cifar", num_classes=5)
    randomise_norms(model)
    dc.dynamize_(model, config)
    return model


# Networks with gates for positions or images: name -> how to build it. Blocks of one package share a network.
MASKED: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: _chain(
        "basic", "basic", "basic_s2", "user", "two paths", "two additions", granularity=2
    ),
    "torchvision blocks": lambda: _chain("bottleneck", "bottleneck_groups", "inverted", unit="conv1x1"),
    "torchvision strided": lambda: _chain("bottleneck_s2", "bottleneck", "shuffle"),
    "timm blocks": lambda: _chain("timm_basic", "timm_inverted", "inverted with se", "convnext"),
    "timm strided": lambda: _chain("bottleneck with se", "blurred", "eca"),
    "timm mobile": lambda: _chain("regnet", "mobilenetv3", "edge with se", "repvit"),
    "timm residual": lambda: _chain("preact", "norm-free"),
    "timm parallel": lambda: _chain("repvgg", "mobileone", "repghost"),
    "timm joined": lambda: _chain("ghost"),
    "hourglass": _hourglass,
    "channels": lambda: _chain("basic", "basic_s2", "gelu", gate=dc.ChannelGate(groups=4)),
    "torchvision channels": lambda: _chain(
        "bottleneck_groups", "bottleneck_s2", "inverted", gate=dc.ChannelGate(groups=4)
    ),
    "narrow": lambda: _chain("basic", "gelu", gate=dc.Narrow()),
    "layer_gate": lambda: _cifar(dc.LayerGate()),
    "halting": lambda: _cifar({"layer1": dc.Halting()}, 14),
}
NEEDS = {"torchvision": "torchvision", "timm": "timm"}
KERNELS = {
    "condconv": dc.CondConv, "dyconv": dc.DYConv, "dynet": dc.DyNetConv, "odconv": dc.ODConv,
    # Its router pools hidden maps in four parts.
    "dcd": functools.partial(dc.DCDConv, pool_size=2),
    "weightnet": dc.WeightNetConv,
}  # fmt: skip


def masked_kernels(kind: str = "all") -> nn.Module:
    """Masked blocks whose convolutions have kernels for each image, of one kind or of all."""
    torch.manual_seed(0)
    if kind == "all":
        model = dc.create_model("resnet8_cifar", num_classes=5)
        places = [f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)]
        dc.dynamize_(model, {place: make() for place, make in zip(places, KERNELS.values(), strict=True)})
        dc.dynamize_(model, dc.SpatialMasking())
    else:
        rule = {r"re:.*\.conv\d$": KERNELS[kind]()}
        model = _chain("mixed", "basic_s2", kernels=rule)
    return spread_routers(randomise_norms(model)).eval()


def spread_routers(model: nn.Module) -> nn.Module:
    """Routers that start neutral, and dynamic parts that start at zero, would hide kernels of other images."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.5)
        if isinstance(module, dc.nn.DCDConv2d):
            nn.init.normal_(module.p, 0, 0.1)
    return model


def needed(name: str) -> str | None:
    """The optional package that a member comes from."""
    return next((package for start, package in NEEDS.items() if name.startswith(start)), None)


@functools.lru_cache(maxsize=1)
def masked(name: str) -> tuple[nn.Module, nn.Module]:
    """The network, and the same with its masks as inputs."""
    torch.manual_seed(0)
    model = MASKED[name]().eval()
    return model, MaskInputs(copy.deepcopy(model)).eval()


def example(model: nn.Module, n: int, density: float, size: tuple[int, ...] = SIZE) -> tuple[Tensor, ...]:
    """Images and forced masks."""
    x = torch.randn(n, *size, generator=torch.Generator().manual_seed(n))
    return (x, *forced(model, x, density))
