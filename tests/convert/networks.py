"""Small blocks and networks for tests."""

from __future__ import annotations

import torch
from torch import nn

from dynaconv.convert import SpatialMasking, dynamize_, masked_blocks
from dynaconv.models import BasicBlock
from dynaconv.nn import MaskedBlock


def randomise_norms(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every batch norm statistics and affine terms that would show a folding mistake."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.3, 0.3),
                (module.running_var, 0.5, 2.0),
                (module.weight.data, 0.5, 1.5),
                (module.bias.data, -0.3, 0.3),
            ):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def small_block(kind: str, config: SpatialMasking | None = None) -> MaskedBlock:
    """A masked block of the given kind, with random batch norms."""
    torch.manual_seed(0)
    holder = nn.Sequential(randomise_norms(_BLOCKS[kind]()))
    dynamize_(holder, config or SpatialMasking(preset="paper"))
    return masked_blocks(holder)["0"]


def _bottleneck(stride: int = 1, groups: int = 1) -> nn.Module:
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.models.resnet import Bottleneck

    down = None
    if stride != 1:
        down = nn.Sequential(nn.Conv2d(16, 16, 1, stride, bias=False), nn.BatchNorm2d(16))
    return Bottleneck(16, 4, stride, down, groups=groups, base_width=64 if groups == 1 else 32 * groups)


def _timm_basic() -> nn.Module:
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.models.resnet import BasicBlock as TimmBlock

    return TimmBlock(8, 8)


def _inverted() -> nn.Module:
    from dynaconv.integrations.torchvision import import_torchvision

    import_torchvision()
    from torchvision.models.mobilenetv2 import InvertedResidual

    return InvertedResidual(8, 8, 1, 3)


def _timm_inverted() -> nn.Module:
    from dynaconv.integrations.timm import import_timm

    import_timm()
    from timm.models._efficientnet_blocks import InvertedResidual

    return InvertedResidual(8, 8, exp_ratio=3.0, act_layer=nn.ReLU6)


_BLOCKS = {
    "basic": lambda: BasicBlock(8, 8),
    "basic_s2": lambda: BasicBlock(6, 10, 2),
    "bottleneck": _bottleneck,
    "bottleneck_s2": lambda: _bottleneck(2),
    "bottleneck_groups": lambda: _bottleneck(1, 2),
    "timm_basic": _timm_basic,
    "inverted": _inverted,
    "timm_inverted": _timm_inverted,
}
