"""Static networks by name, which the published methods make dynamic."""

from __future__ import annotations

import re
from collections.abc import Callable

from torch import nn

from dynaconv import _checks
from dynaconv.convert.layer_sites import layer_sites
from dynaconv.models.cifar_resnet import CifarResNet
from dynaconv.models.dynamic.widths import SHUFFLENET_V2_WIDTHS

# (expansion, kernel, stride, in, out, repeats) of each row, arXiv 1905.11946, table 1.
_EFFICIENTNET_ROWS = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
_RESNETS = (18, 34, 50, 101, 152)
_EXAMPLES = (
    "resnet18",
    "mobilenetv2_100",
    "mobilenetv3_small",
    "mobilenetv3_large",
    "efficientnet_b0",
    "efficientnet_b0_depth110",
    "shufflenetv2_100",
    "mnasnet_100",
    "convnext_tiny",
    "resnet8_cifar",
    "resnet8_scenes",
)


def build_base(
    name: str, *, num_classes: int | None = None, in_chans: int | None = None, **options
) -> nn.Module:
    """A static network with the layers of a published one; torchvision's, but for our CIFAR ResNets.

    Args:
        name: resnet18, mobilenetv2_075 (width in percent, any), mobilenetv3_small, efficientnet_b0 (depth in percent
            as efficientnet_b0_depth110), shufflenetv2_100, mnasnet_100, convnext_tiny, resnet14_cifar, resnet8_scenes.
        num_classes, in_chans: None keeps the network's own (1000 or 10 classes, 3 channels).
        options: for the network's constructor, such as dropout.
    Raises:
        ValueError: an unknown name. ImportError: torchvision is not installed.
    """
    if num_classes is not None:
        _checks.positive("num_classes", num_classes)
        options["num_classes"] = num_classes
    small = re.fullmatch(r"resnet(\d+)_(cifar|scenes)", name)
    if small:
        return _small_resnet(int(small[1]), small[2], in_chans, options)
    model = _torchvision(name, options)
    if in_chans not in (None, 3):
        _replace_stem(model, in_chans)
    return model


def is_base(name: str) -> bool:
    """`build_base` knows this name."""
    return _match(name) is not None or re.fullmatch(r"resnet\d+_(cifar|scenes)", name) is not None


def _small_resnet(depth: int, kind: str, in_chans: int | None, options: dict) -> nn.Module:
    scenes = {"width": 32, "stem_stride": 2, "pool": "max", "image_size": 96} if kind == "scenes" else {}
    return CifarResNet(depth, in_chans=in_chans or 3, **{**scenes, **options})


def _match(name: str) -> tuple[Callable[..., nn.Module], re.Match[str]] | None:
    found = ((build, re.fullmatch(pattern, name)) for pattern, build in _PATTERNS.items())
    return next(((build, match) for build, match in found if match), None)


def _torchvision(name: str, options: dict) -> nn.Module:
    found = _match(name)
    if found is None:
        raise _checks.unknown("base network", name, _EXAMPLES)
    from dynaconv.integrations.torchvision import import_torchvision

    build, match = found
    return build(import_torchvision().models, match, **options)


def _resnet(models, match, **options) -> nn.Module:
    return models.get_model(f"resnet{match[1]}", weights=None, **options)


def _mobilenet_v2(models, match, **options) -> nn.Module:
    return models.mobilenet_v2(weights=None, width_mult=int(match[1]) / 100, **options)


def _mobilenet_v3(models, match, **options) -> nn.Module:
    width = {"width_mult": int(match[2]) / 100} if match[2] else {}
    return models.get_model(f"mobilenet_v3_{match[1]}", weights=None, **width, **options)


def _efficientnet(models, match, **options) -> nn.Module:
    if match[2] is None:
        return models.get_model(f"efficientnet_{match[1]}", weights=None, **options)
    if match[1] != "b0":
        raise ValueError(f"a depth factor is for efficientnet_b0, got {match[0]!r}")
    from torchvision.models.efficientnet import MBConvConfig

    depth = int(match[2]) / 100
    rows = [MBConvConfig(*row, width_mult=1.0, depth_mult=depth) for row in _EFFICIENTNET_ROWS]
    return models.EfficientNet(rows, **{"dropout": 0.2, "stochastic_depth_prob": 0.2, **options})


def _shufflenet_v2(models, match, **options) -> nn.Module:
    width = int(match[1])
    if width not in SHUFFLENET_V2_WIDTHS:
        known = ", ".join(f"shufflenetv2_{w:03d}" for w in SHUFFLENET_V2_WIDTHS)
        raise ValueError(f"ShuffleNetV2 has these widths: {known}, got {match[0]!r}")
    stages = SHUFFLENET_V2_WIDTHS[width]
    return models.ShuffleNetV2([4, 8, 4], [24, *stages, 2048 if width == 200 else 1024], **options)


def _mnasnet(models, match, **options) -> nn.Module:
    return models.MNASNet(int(match[1]) / 100, **options)


def _convnext(models, match, **options) -> nn.Module:
    return models.get_model(match[0], weights=None, **options)


_PATTERNS: dict[str, Callable[..., nn.Module]] = {
    rf"resnet({'|'.join(map(str, _RESNETS))})": _resnet,
    r"mobilenetv2_(\d{3})": _mobilenet_v2,
    r"mobilenetv3_(small|large)(?:_(\d{3}))?": _mobilenet_v3,
    r"efficientnet_(b[0-7])(?:_depth(\d{3}))?": _efficientnet,
    r"shufflenetv2_(\d{3})": _shufflenet_v2,
    r"mnasnet_(\d{3})": _mnasnet,
    r"convnext_(tiny|small|base|large)": _convnext,
}


def _replace_stem(model: nn.Module, in_chans: int) -> None:
    """A first convolution for pictures of in_chans channels."""
    _checks.positive("in_chans", in_chans)
    name = layer_sites(model)[0].name
    old = model.get_submodule(name)
    new = nn.Conv2d(
        in_chans, old.out_channels, old.kernel_size, old.stride, old.padding, bias=old.bias is not None
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
    if new.bias is not None:
        nn.init.zeros_(new.bias)
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = new
