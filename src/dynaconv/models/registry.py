"""Networks by name: ours, timm's as `timm:NAME`, torchvision's as `torchvision:NAME`."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from functools import partial

from torch import nn

from dynaconv import _checks
from dynaconv.convert import SpatialMasking, dynamize_
from dynaconv.models.cifar_resnet import CifarResNet
from dynaconv.models.dynamic.names import listed_names, parse_name
from dynaconv.models.dynamic.published import create_dynamic
from dynaconv.models.hourglass import HourglassNet

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_PREFIXES = ("timm:", "torchvision:")


def register_model(name: str, build: Callable[..., nn.Module]) -> None:
    """Add a network: build(num_classes=..., in_chans=..., **options)."""
    _MODELS[name] = build


def _masked(build: Callable[..., nn.Module], masking: SpatialMasking | None = None, **options) -> nn.Module:
    model = build(**options)
    dynamize_(model, masking or SpatialMasking())
    return model


for _depth in (8, 14, 20, 26, 32):
    register_model(f"resnet{_depth}_cifar", partial(CifarResNet, _depth))
_scenes = partial(CifarResNet, width=32, stem_stride=2, pool="max", image_size=96)
for _depth in (8, 14):
    register_model(f"resnet{_depth}_scenes", partial(_scenes, _depth))
for _name, _build in list(_MODELS.items()):
    register_model(f"dynconv_{_name}", partial(_masked, _build))
_small = partial(HourglassNet, num_classes=5, width=32, depth=3, image_size=96)
# Where every position counts the cheaper mask unit does, as published.
_pointwise = SpatialMasking(unit="conv1x1")
for _name, _build in {
    "hourglass1_scenes": partial(_small, stacks=1),
    "hourglass2_scenes": partial(_small, stacks=2),
    "hourglass4_mpii": HourglassNet,
}.items():
    register_model(_name, _build)
    register_model(f"dynconv_{_name}", partial(_masked, _build, _pointwise))
for _name in listed_names():
    register_model(_name, partial(create_dynamic, _name))


def list_models(pattern: str = "*") -> list[str]:
    """Names that `create_model` knows, filtered by a shell pattern.

    Networks with dynamic kernels exist for other widths, depths, bases and numbers of kernels too, as METHOD[K]_BASE:
    `condconv16_resnet34`, `odconv2_resnet101`, `dyconv4_mobilenetv2_140`, `dymobile_075`; the list has the usual ones.
    `timm:NAME` and `torchvision:NAME` reach those libraries' networks; list them with a pattern that starts with
    the prefix, such as "timm:resnet*".

    >>> list_models("resnet*_scenes")
    ['resnet14_scenes', 'resnet8_scenes']
    """
    prefix = next((p for p in _PREFIXES if pattern.startswith(p)), None)
    if prefix is not None:
        return [prefix + n for n in _external_names(prefix) if fnmatch.fnmatch(n, pattern[len(prefix) :])]
    return sorted(fnmatch.filter(_MODELS, pattern))


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    pretrained: bool = False,
    **options,
) -> nn.Module:
    """Build a network by name.

    Args:
        name: one of `list_models()` or of their other sizes, or "timm:resnet50", "torchvision:mobilenet_v2".
        num_classes, in_chans: as in timm; None keeps the network's own default.
        pretrained: only for timm and torchvision, needs a network connection.
        options: passed to the network; `dynconv_*` takes `masking=SpatialMasking(...)`, networks with dynamic kernels
            `kernels=CondConv(...)` in place of the published config.
    Raises:
        ValueError: unknown name (the nearest ones are named), or pretrained weights for a network that has none.

    >>> create_model("dynconv_resnet8_cifar", num_classes=4)(__import__("torch").zeros(1, 3, 32, 32)).shape
    torch.Size([1, 4])
    """
    if num_classes is not None:
        options["num_classes"] = num_classes
    if in_chans is not None:
        options["in_chans"] = in_chans
    prefix = next((p for p in _PREFIXES if name.startswith(p)), None)
    if prefix is not None:
        return _create_external(prefix, name[len(prefix) :], pretrained, options)
    build = _MODELS.get(name)
    if build is None and parse_name(name) is not None:
        build = partial(create_dynamic, name)
    if build is None:
        raise _checks.unknown(
            "model", name, _MODELS, "(timm:NAME and torchvision:NAME reach other libraries)"
        )
    if pretrained:
        raise ValueError(
            f"there are no pretrained weights for {name!r}; train it, or load a run with dc.load(RUN/model)"
        )
    return build(**options)


def _external_names(prefix: str) -> list[str]:
    if prefix == "timm:":
        from dynaconv.integrations.timm import import_timm

        return list(import_timm().list_models())
    from dynaconv.integrations.torchvision import import_torchvision

    return list(import_torchvision().models.list_models())


def _create_external(prefix: str, name: str, pretrained: bool, options: dict) -> nn.Module:
    known = _external_names(prefix)
    if name not in known:
        raise _checks.unknown(f"{prefix[:-1]} model", name, known)
    if prefix == "timm:":
        from dynaconv.integrations.timm import import_timm

        return import_timm().create_model(name, pretrained=pretrained, **options)
    from dynaconv.integrations.torchvision import import_torchvision

    if options.pop("in_chans", 3) != 3:
        raise ValueError(
            "torchvision's networks take 3 channels; use the timm network of the same name for others"
        )
    models = import_torchvision().models
    if not pretrained and "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        # Segmentation and detection would fetch those of their backbone.
        options.setdefault("weights_backbone", None)
    return models.get_model(name, weights="DEFAULT" if pretrained else None, **options)
