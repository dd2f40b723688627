"""Replacing static convolutions by dynamic ones, and back."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from torch import nn
from torch.nn.utils import parametrize

from dynaconv import _checks
from dynaconv.convert.kernel_config import KernelConfig, Place
from dynaconv.convert.layer_sites import LayerSite, find_blocks, layer_sites, network_family
from dynaconv.convert.replace import replace_module
from dynaconv.convert.rules import Rules, config_for
from dynaconv.convert.scopes import paper_sites, with_router_blocks
from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.nn.routers import Router

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_UNNAMED = object()


@dataclass(frozen=True)
class KernelSite:
    """A layer that becomes dynamic: its name, how, and the block whose router it shares (None: its own)."""

    name: str
    config: KernelConfig
    block: str | None


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    """All layers with a kernel per sample, by name (dynamic classifiers included).

    >>> import dynaconv as dc
    >>> model = dc.create_model("resnet8_cifar")
    >>> report = dc.dynamize_(model, {"layer3.0.conv2": dc.DYConv()})
    >>> list(dynamic_layers(model))
    ['layer3.0.conv2']
    """
    return {name: m for name, m in model.named_modules() if isinstance(m, DynamicLayer)}


def plan_kernels(model: nn.Module, rules: Rules) -> list[KernelSite]:
    """The layers that rules make dynamic, in forward order where it is known.

    Raises:
        ValueError: a network whose structure is unknown with scope="paper", or two routers for one block.
    """
    sites = _known_sites(model)
    named = _named(model, rules, {s.name for s in sites if s.role == "squeeze_excite"})
    chosen = {name: config for name, config in named.items() if config is not None}
    whole = config_for("", {"": rules.get("")}, KernelConfig)
    if whole is not None:
        scope = [*(s.name for s in _scope(model, whole, sites)), *dynamic_layers(model)]
        chosen.update({name: whole for name in scope if name not in named})
    blocks: dict[str, str | None] = {}
    for kind in {config.kind for config in chosen.values() if sites}:
        own = [s for s in sites if s.name in chosen and chosen[s.name].kind == kind]
        blocks.update({s.name: s.block for s in with_router_blocks(model, kind, own)})
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    plan = [
        KernelSite(name, chosen[name], blocks.get(name) if chosen[name].shares_router else None)
        for name in sorted(chosen, key=order.__getitem__)
    ]
    _one_router_a_block(plan)
    return plan


def parametrized_layers(model: nn.Module, rules: Rules) -> list[str]:
    """Convolutions that rules cover and that yet stay static, because a parametrization makes their weights.

    Where the structure is known, a scope names such layers, too, and the conversion is refused.
    """
    names = [n for n, m in model.named_modules() if _kind(m) in CONVOLUTIONS]
    whole = None if _known_sites(model) else config_for("", {"": rules.get("")}, KernelConfig)
    by_name = {rule: value for rule, value in rules.items() if rule}
    return [
        name
        for i, name in enumerate(names)
        if parametrize.is_parametrized(model.get_submodule(name))
        and config_for(name, by_name, KernelConfig, whole if i else None) is not None
    ]


def _kind(module: nn.Module) -> type:
    """The type of a module as it was written."""
    return parametrize.type_before_parametrizations(module)


def _named(model: nn.Module, rules: Rules, opt_in: set[str]) -> dict[str, KernelConfig | None]:
    """Layers that rules by name speak of; `opt_in` ones only when a rule names them, not when it names a parent."""
    by_name = {rule: value for rule, value in rules.items() if rule}
    closed = [*dynamic_layers(model), *(n for n, m in model.named_modules() if isinstance(m, Gate | Router))]
    named = {}
    for name, module in model.named_modules():
        exact = name in by_name and next(module.children(), None) is None
        plain = type(module) in CONVOLUTIONS and not any(name.startswith(f"{c}.") for c in closed)
        # Layers that are dynamic already are listed too, to be refused.
        if not (exact or plain or isinstance(module, DynamicLayer)):
            continue
        usable = by_name
        if name in opt_in:
            usable = {r: v for r, v in by_name.items() if r == name or r.startswith("re:")}
        config = config_for(name, usable, KernelConfig, _UNNAMED)
        if config is not _UNNAMED:
            named[name] = config
    return named


def _one_router_a_block(plan: list[KernelSite]) -> None:
    owners: dict[str, KernelConfig] = {}
    for site in plan:
        if site.block is not None and owners.setdefault(site.block, site.config) != site.config:
            raise _checks.two_routers(site.block)


def _known_sites(model: nn.Module) -> list[LayerSite]:
    try:
        return layer_sites(model)
    except ValueError:
        # Rules by name need no structure; each layer then has a router of its own.
        return []


def _scope(model: nn.Module, config: KernelConfig, sites: list[LayerSite]) -> list[LayerSite]:
    if config.scope == "paper":
        return paper_sites(
            model, config.kind, first_block=config.first_block, head=config.head, classifier=config.classifier
        )
    if sites:
        return [s for s in sites if s.role not in ("stem", "squeeze_excite", "post_pool", "classifier")]
    names = [n for n, m in model.named_modules() if _kind(m) in CONVOLUTIONS]
    return [LayerSite(n, "conv", None) for n in names[1:] if type(model.get_submodule(n)) in CONVOLUTIONS]


def check_kernels(model: nn.Module, plan: list[KernelSite]) -> None:
    """Raise, before anything is changed, for layers that cannot become dynamic.

    Raises:
        ValueError: a layer that is shared by two places of the network. TypeError: not a plain convolution.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    for site in plan:
        module = model.get_submodule(site.name)
        if len(names[id(module)]) > 1:
            raise _checks.layer_used_twice(site.name, names[id(module)])
        if isinstance(module, DynamicLayer):
            raise _checks.already_dynamic(site.name, type(module).__name__)
        if not isinstance(module, nn.Linear):
            site.config.layer_for(module)


def apply_kernels(model: nn.Module, plan: list[KernelSite]) -> None:
    """Replace the planned layers, and wrap the blocks whose layers share a router."""
    place = _place(model)
    groups: dict[tuple[str, KernelConfig], list[str]] = {}
    for site in plan:
        if site.block is not None:
            groups.setdefault((site.block, site.config), []).append(site.name)
    with ExitStack() as undo:
        for site in plan:
            old = model.get_submodule(site.name)
            undo.callback(replace_module, model, site.name, old)
            replace_module(model, site.name, _converted(old, site, place))
        for (block, config), names in groups.items():
            undo.callback(replace_module, model, block, model.get_submodule(block))
            replace_module(model, block, _routed(model.get_submodule(block), block, config, names, place))
        # Everything fitted: nothing to undo.
        undo.pop_all()


def _place(model: nn.Module) -> Place:
    try:
        family = network_family(model)
    except ValueError:
        return Place()
    bottleneck = any(hasattr(block, "conv3") for block in find_blocks(model).values())
    return Place(family, bottleneck)


def _converted(old: nn.Module, site: KernelSite, place: Place) -> nn.Module:
    new = (
        site.config.convert_linear(old, place)
        if isinstance(old, nn.Linear)
        else site.config.convert_conv(old, shared=site.block is not None, place=place)
    )
    new.config = site.config
    return new


def _routed(block: nn.Module, name: str, config: KernelConfig, names: list[str], place: Place) -> RoutedBlock:
    layers = [block.get_submodule(n[len(name) + 1 :]) for n in names]
    router = config.block_router(block_channels(block), layers, place)
    return RoutedBlock(block, router, [n[len(name) + 1 :] for n in names])


def block_channels(block: nn.Module) -> int:
    """Channels of a block's input: those of its first convolution, twice as many where a unit splits them."""
    if hasattr(block, "branch1") and hasattr(block, "branch2") and not list(block.branch1.children()):
        return 2 * block_channels(block.branch2)
    first = next(m for m in block.modules() if isinstance(m, (*CONVOLUTIONS, DynamicConv)))
    return first.in_channels


def revert_kernels(model: nn.Module) -> list[str]:
    """Put the static layers of neutral coefficients back, with the original names; returns the layers' names."""
    for name, module in [(n, m) for n, m in model.named_modules() if isinstance(m, RoutedBlock)]:
        replace_module(model, name, module.block)
    layers = dynamic_layers(model)
    for name, layer in layers.items():
        static = layer.to_linear() if hasattr(layer, "to_linear") else layer.to_conv()
        replace_module(model, name, static)
    return list(layers)


def static_name(model: nn.Module, name: str) -> str:
    """The name that a layer or block had before blocks were wrapped around it."""
    parts, kept = name.split("."), []
    for i, part in enumerate(parts):
        parent = model.get_submodule(".".join(parts[:i]))
        if not (part == "block" and isinstance(parent, RoutedBlock | MaskedBlock)):
            kept.append(part)
    return ".".join(kept)
