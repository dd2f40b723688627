"""Small members of every family, with masks as inputs, exported once and lowered in both ways."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import torch
from tests.convert.networks import _BLOCKS, randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.testing import MaskInputs, forced

SIZE = (3, 13, 11)


def _blocks(kind: str, **options) -> nn.Module:
    """A stem, two masked blocks of a kind with something dense between them, and a head."""
    blocks = (
        nn.Sequential(_BLOCKS[kind](), _BLOCKS[kind]())
        if "s2" not in kind
        else nn.Sequential(_BLOCKS[kind]())
    )
    first = next(m for m in blocks.modules() if isinstance(m, nn.Conv2d))
    outputs = {"basic_s2": 10}.get(kind, first.in_channels)
    model = nn.Sequential(
        nn.Conv2d(3, first.in_channels, 3, padding=1), nn.BatchNorm2d(first.in_channels), nn.ReLU(), blocks,
        nn.Conv2d(outputs, 6, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 5),
    )  # fmt: skip
    randomise_norms(model)
    dc.dynamize_(model, dc.SpatialMasking(preset="paper", **options))
    return model


def _cifar(config: object, depth: int = 8) -> nn.Module:
    model = dc.create_model(f"resnet{depth}_cifar", num_classes=5)
    randomise_norms(model)
    dc.dynamize_(model, config)
    return model


# Whole networks with gates for positions or images: name -> how to build it.
MASKED: dict[str, Callable[[], nn.Module]] = {
    "basic": lambda: _blocks("basic", granularity=2),
    "basic_s2": lambda: _blocks("basic_s2"),
    "bottleneck": lambda: _blocks("bottleneck"),
    "bottleneck_s2": lambda: _blocks("bottleneck_s2"),
    "bottleneck_groups": lambda: _blocks("bottleneck_groups", unit="conv1x1"),
    "inverted": lambda: _blocks("inverted"),
    "timm_basic": lambda: _blocks("timm_basic"),
    "timm_inverted": lambda: _blocks("timm_inverted"),
    "layer_gate": lambda: _cifar(dc.LayerGate()),
    "halting": lambda: _cifar({"layer1": dc.Halting()}, 14),
}
NEEDS = {"bottleneck": "torchvision", "inverted": "torchvision", "timm": "timm"}
KERNELS = {
    "condconv": dc.CondConv, "dyconv": dc.DYConv, "dynet": dc.DyNetConv, "dcd": dc.DCDConv, "odconv": dc.ODConv,
    "weightnet": dc.WeightNetConv,
}  # fmt: skip


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
