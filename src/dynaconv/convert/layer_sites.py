"""Where the layers of a network stand: stem, expansion, depthwise, shortcut, head, classifier, ...

Networks are recognised by class names and module structure, so neither torchvision nor timm is imported.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.nn.routers import Router

ROLES = (
    "stem",
    "expand",
    "depthwise",
    "project",
    "conv",
    "shortcut",
    "squeeze_excite",
    "head",
    "post_pool",
    "classifier",
)

# Class names of networks and blocks: torchvision's, timm's and ours.
_FAMILIES = {
    "ResNet": "resnet",
    "CifarResNet": "resnet",
    "DyResNet": "resnet",
    "RegNet": "resnet",
    "MobileNetV2": "mobilenetv2",
    "MobileNetV3": "mobilenetv3",
    "EfficientNet": "efficientnet",
    "MNASNet": "mnasnet",
    "ShuffleNetV2": "shufflenetv2",
    "DyShuffleNetV2": "shufflenetv2",
    "WeightShuffleNetV2": "shufflenetv2",
    "ConvNeXt": "convnext",
    "DyMobile": "dymobile",
}
_RESIDUAL = ("BasicBlock", "Bottleneck", "ResBottleneckBlock", "DyMobileBlock")
_INVERTED = (
    "InvertedResidual",
    "_InvertedResidual",
    "DepthwiseSeparableConv",
    "MBConv",
    "DyShuffleUnit",
    "WeightShuffleUnit",
)
_BLOCKS = (*_RESIDUAL, *_INVERTED, "FusedMBConv", "EdgeResidual", "ConvBnAct", "CNBlock", "ConvNeXtBlock")
_SHORTCUTS = {"downsample", "shortcut", "proj", "branch1"}
_SQUEEZE_TYPES = {"SqueezeExcitation", "SqueezeExcite", "SEModule"}
_CONVS = (nn.Conv2d, DynamicConv)
_POOLS = ("AdaptiveAvgPool2d", "AdaptiveMaxPool2d", "AvgPool2d", "SelectAdaptivePool2d")


@dataclass(frozen=True)
class LayerSite:
    """One layer of a network and its place.

    name: path of the Conv2d or Linear; role: one of `ROLES`; block: path of the block it belongs to (the module
    whose input a shared router sees), None outside the blocks.

    Roles: stem; expand, depthwise (grouped convolutions too) and project of an inverted residual; conv (any other
    convolution of the main path); shortcut (projections, and the left branch of ShuffleNetV2's strided units);
    squeeze_excite; head (the last convolution before the pool); post_pool (behind it, but not the last layer);
    classifier.
    """

    name: str
    role: str
    block: str | None = None


def layer_sites(model: nn.Module) -> list[LayerSite]:
    """Every Conv2d, and every Linear behind the blocks, with its role, in forward order.

    Knows ResNet and RegNet of any depth and width (torchvision's and timm's; our CIFAR ResNets), MobileNetV2,
    MobileNetV3, EfficientNet, MNASNet, ShuffleNetV2 (torchvision's), ConvNeXt, and our DyMobile, DyResNet,
    DyShuffleNetV2 and WeightShuffleNetV2. Convolutions of the gates of masked blocks are no sites.

    Raises:
        ValueError: a network whose structure is not known.

    >>> import dynaconv as dc
    >>> layer_sites(dc.create_model("resnet8_cifar"))[1]
    LayerSite(name='layer1.0.conv1', role='conv', block='layer1.0')
    """
    family, blocks = network_family(model), find_blocks(model)
    modules = [(n, m) for n, m in _ungated(model).items() if n]
    owners = [_owner(name, blocks) for name, _ in modules]
    first = next(i for i, owner in enumerate(owners) if owner)
    last = len(owners) - 1 - next(i for i, owner in enumerate(reversed(owners)) if owner)
    roles = {f"{b}.{n}": role for b, block in blocks.items() for n, role in _block_roles(block).items()}
    sites, pooled = [], False
    for i, (name, module) in enumerate(modules):
        pooled = pooled or (i > last and type(module).__name__ in _POOLS)
        if name in roles:
            sites.append(LayerSite(name, roles[name], owners[i]))
        elif isinstance(module, _CONVS):
            role = "stem" if i < first else "conv" if i < last else "post_pool" if pooled else "head"
            sites.append(LayerSite(name, role))
        elif isinstance(module, nn.Linear | DynamicLayer) and i > last:
            sites.append(LayerSite(name, "post_pool"))
    outside = [s.role for s in sites if s.block is None]
    if ("conv" in outside and family != "convnext") or outside.count("head") > 1:
        raise _unknown(model)
    # Layers that are dynamic already helped to tell the roles of the others.
    static = {name for name, module in modules if not isinstance(module, DynamicLayer)}
    return [s for s in _name_ends(model, sites) if s.name in static]


def network_family(model: nn.Module) -> str:
    """resnet, mobilenetv2, mobilenetv3, efficientnet, mnasnet, shufflenetv2, convnext or dymobile.

    timm builds MobileNetV2, MNASNet and EfficientNet from one class; without squeeze-excite, 3x3 depthwise
    convolutions alone mean MobileNetV2 there, other sizes too MNASNet.

    Raises:
        ValueError: a network whose structure is not known.
    """
    family = next((_FAMILIES[c.__name__] for c in type(model).__mro__ if c.__name__ in _FAMILIES), None)
    blocks = find_blocks(model) if family else {}
    if family is None or not blocks:
        raise _unknown(model)
    if family == "efficientnet" and all(type(b).__name__ in _INVERTED for b in blocks.values()):
        squeeze = any(type(m).__name__ in _SQUEEZE_TYPES for m in model.modules())
        kernels = {m.kernel_size for m in model.modules() if isinstance(m, _CONVS) and m.groups > 1}
        family = family if squeeze else "mobilenetv2" if kernels == {(3, 3)} else "mnasnet"
    return family


def _unknown(model: nn.Module) -> ValueError:
    return ValueError(
        f"the layers of {type(model).__name__} have no known roles, so no paper's choice applies to it; "
        'name the layers by rules instead, such as {r"re:layer4.*conv2": dc.DYConv()}'
    )


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of a network of a known family by path, in forward order; blocks inside blocks are not listed."""
    found: dict[str, nn.Module] = {}
    for name, module in _ungated(model).items():
        if name and type(module).__name__ in _BLOCKS and _owner(name, found) is None:
            found[name] = module
    # timm's MobileNetV3 puts its head convolution last among the blocks.
    while found and type(found[next(reversed(found))]).__name__ == "ConvBnAct":
        found.popitem()
    return found


def _ungated(model: nn.Module) -> dict[str, nn.Module]:
    """named_modules without the gates of masked blocks and the routers of dynamic layers."""
    modules = dict(model.named_modules())
    closed = tuple(
        f"{name}.gate." if isinstance(m, MaskedBlock) else f"{name}."
        for name, m in modules.items()
        if isinstance(m, MaskedBlock | Router)
    )
    return {n: m for n, m in modules.items() if not f"{n}.".startswith(closed)}


def _owner(name: str, blocks: dict[str, nn.Module]) -> str | None:
    """Path of the block that `name` is, or lies in."""
    parts = name.split(".")
    return next((p for n in range(len(parts)) if (p := ".".join(parts[: n + 1])) in blocks), None)


def _block_roles(block: nn.Module) -> dict[str, str]:
    """Role of every convolution of a block, by its path inside the block."""
    roles, path = {}, []
    squeezes = [
        n for n, m in block.named_modules() if n.split(".")[-1] == "se" or type(m).__name__ in _SQUEEZE_TYPES
    ]
    for name, module in block.named_modules():
        if not isinstance(module, _CONVS):
            continue
        if any(name.startswith(s + ".") for s in squeezes):
            roles[name] = "squeeze_excite"
        elif _SHORTCUTS & set(name.split(".")):
            roles[name] = "shortcut"
        else:
            path.append(name)
            roles[name] = "expand"
    if type(block).__name__ in _RESIDUAL or len(path) == 1:
        roles.update(dict.fromkeys(path, "conv"))
    else:
        roles[path[-1]] = "project"
    if type(block).__name__ not in _RESIDUAL:
        roles.update({n: "depthwise" for n in path if block.get_submodule(n).groups > 1})
    return roles


def _name_ends(model: nn.Module, sites: list[LayerSite]) -> list[LayerSite]:
    """The last linear layer classifies; torchvision's MNASNet keeps its first separable block outside of modules."""
    linears = [s.name for s in sites if not isinstance(model.get_submodule(s.name), _CONVS)]
    renamed = {linears[-1]: "classifier"} if linears else {}
    if type(model).__name__ == "MNASNet":
        stem = [s.name for s in sites if s.role == "stem"]
        renamed.update(zip(stem[1:], ("depthwise", "project"), strict=True))
    return [LayerSite(s.name, renamed.get(s.name, s.role), s.block) for s in sites]
