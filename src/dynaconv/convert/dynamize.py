"""Make a static network dynamic in place, and undo it."""

from __future__ import annotations

from torch import nn

from dynaconv.convert.attached import refuse_attached
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.granularity import fit_granularity
from dynaconv.convert.halting import revert_halting
from dynaconv.convert.handlers import Refusal, find_blocks, recognise
from dynaconv.convert.kernels import (
    KernelSite,
    apply_kernels,
    check_kernels,
    parametrized_layers,
    plan_kernels,
    revert_kernels,
)
from dynaconv.convert.replace import replace_module
from dynaconv.convert.report import ConversionReport, ModuleOutcome
from dynaconv.convert.rules import Config, Rules, as_rules, config_for
from dynaconv.convert.sharing import shared_layer
from dynaconv.convert.structure import adds_itself
from dynaconv.nn.dynamic_conv import DynamicLayer
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import Anatomy, MaskedBlock
from dynaconv.nn.routed_block import RoutedBlock

NOT_ASKED = "no rule asks for it"
PARAMETRIZED = (
    "a parametrization makes its weights; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
)
_Found = dict[str, "tuple[Anatomy, GateConfig] | Refusal | None"]


def dynamize_(
    model: nn.Module,
    config: Config | Rules | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
) -> ConversionReport:
    """Make a network decide where to compute, with which kernel, or both, in place; `revert_` undoes it.

    Args:
        model: a static network: our CIFAR ResNets, timm and torchvision networks, or any other with rules by name.
            Gates can be added to a network whose kernels are dynamic already.
        config: a gate config (default `SpatialMasking()`) for all residual blocks, a kernel config (`CondConv()`,
            `DYConv()`, ...) for the layers that its scope names, or a tuple of both; or rules {module name or
            "re:pattern": config, tuple or None}. Names beat patterns, longer names beat shorter ones, patterns are
            tried in order. A rule with a kernel config covers every convolution under its name.
        input_size: (C, H, W) for the MACs in the report; by default what the model itself says, else 3x224x224.
    Returns:
        ConversionReport: every module, what became of it or why not, parameters and dense MACs before and after.
    Raises:
        ValueError: nothing to convert (with the reasons), an already dynamic block or layer, a layer used twice, a rule
            that matches nothing, hooks or parametrizations on what is converted. TypeError: a layer that cannot be
            dynamic. The model is then as it was.
    Source: arXiv 1912.03203 (masks); 1904.04971, 1912.03458, 2004.10694, 2103.08756, 2209.07947 (kernels).

    >>> import dynaconv as dc
    >>> len(dc.dynamize_(dc.create_model("resnet8_cifar")).converted)
    3
    >>> dc.dynamize_(dc.create_model("resnet8_cifar"), {"layer3": dc.DYConv()}).converted
    ['layer3.0.conv1', 'layer3.0.conv2', 'layer3.0.downsample.0']
    """
    rules = as_rules(config, model)
    found = _find(model, rules)
    plan = plan_kernels(model, rules)
    masked = {name: verdict for name, verdict in found.items() if isinstance(verdict, tuple)}
    if masked or not plan:
        _refuse_converted(model)
    skipped = [n for n, v in found.items() if isinstance(v, Refusal) and v.reason != NOT_ASKED]
    refuse_attached(model, [*masked, *(site.name for site in plan)], skipped)
    check_kernels(model, plan)
    left = parametrized_layers(model, rules)
    if not masked and not plan:
        refuse_attached(model, [], left)
        raise ValueError(_nothing(model, found))
    report = ConversionReport(params_before=_count(model))
    report.input_size, report.dense_macs_before = _dense_macs(model, input_size)
    fitted = fit_granularity(model, {name: config for name, (_, config) in masked.items()}, report.input_size)
    masked = {name: (anatomy, fitted[name]) for name, (anatomy, _) in masked.items()}
    outcomes = _outcomes(model, found, plan, left)
    apply_kernels(model, plan)
    for name in masked:
        anatomy, gate_config = masked[name]
        if any(isinstance(m, DynamicLayer) for m in model.get_submodule(name).modules()):
            # Read again: the convolutions in it may be dynamic now.
            anatomy = recognise(model.get_submodule(name))
            assert isinstance(anatomy, Anatomy)
        replace_module(model, name, gate_config.wrap(model.get_submodule(name), anatomy, name))
    for config in dict.fromkeys(config for _, config in masked.values()):
        config.finish_(model, [name for name, (_, own) in masked.items() if own == config])
    report.modules, report.params_after = outcomes, _count(model)
    _, report.dense_macs_after = _dense_macs(model, report.input_size, routing=True)
    return report


def revert_(model: nn.Module) -> list[str]:
    """Make everything static again, in place, with the original names.

    Gates are taken out and the blocks are the original modules. Dynamic kernels become the static convolution of
    neutral coefficients, which is the original one if it was converted exactly and not trained since.

    Returns:
        Names of the blocks and layers that were reverted (empty for a static model).
    """
    names = [name for name, module in model.named_modules() if isinstance(module, MaskedBlock)]
    for name in names:
        replace_module(model, name, model.get_submodule(name).block)
    revert_halting(model)
    return names + revert_kernels(model)


def gates(model: nn.Module) -> dict[str, Gate]:
    """All gates of a network, by the name of the block they decide for (forward order of registration)."""
    return {name: block.gate for name, block in masked_blocks(model).items()}


def masked_blocks(model: nn.Module) -> dict[str, MaskedBlock]:
    """All masked blocks of a network, by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MaskedBlock)}


def _refuse_converted(model: nn.Module) -> None:
    done = masked_blocks(model)
    if done:
        raise ValueError(
            f"{len(done)} blocks are dynamic already ({', '.join(list(done)[:3])}...); call dc.revert_ first"
        )


def _find(model: nn.Module, rules: Rules) -> _Found:
    """Verdict for every module that is a residual block, in forward order; see `find_blocks` for nested ones."""

    def judged(name: str, verdict: Anatomy | Refusal) -> tuple[Anatomy, GateConfig] | Refusal:
        config = config_for(name, rules, GateConfig)
        if config is None or isinstance(verdict, Refusal):
            return Refusal(verdict.kind, NOT_ASKED) if config is None else verdict
        reason = shared_layer(model, name)
        if reason is None:
            reason = config.obstacle(model, name, _unrouted(model.get_submodule(name)), verdict)
        return (verdict, config) if reason is None else Refusal(verdict.kind, reason)

    blocks = find_blocks(model, lambda name, anatomy: isinstance(judged(name, anatomy), tuple))
    return {name: judged(name, verdict) for name, verdict in blocks.items()}


def _unrouted(block: nn.Module) -> nn.Module:
    return block.block if isinstance(block, RoutedBlock) else block


def _outcomes(
    model: nn.Module, found: _Found, plan: list[KernelSite], left: list[str]
) -> list[ModuleOutcome]:
    kernels, rows = {site.name: site for site in plan}, []
    for name, module in model.named_modules():
        if not name:
            continue
        owner = next((b for b, v in found.items() if name.startswith(b + ".") and isinstance(v, tuple)), None)
        verdict = found.get(name)
        if name in kernels:
            status, detail = "converted", kernels[name].config.describe()
        elif name in left:
            status, detail = "skipped", PARAMETRIZED
        elif isinstance(verdict, tuple):
            status, detail = "converted", f"{verdict[0].kind}, {verdict[1].describe()}"
        elif isinstance(verdict, Refusal):
            inside = any(n.startswith(f"{name}.") for n in kernels)
            wanted = verdict.reason != NOT_ASKED
            status, detail = ("kept", "container") if inside and not wanted else ("skipped", verdict.reason)
        elif owner is not None:
            status, detail = "inside", f"part of {owner}"
        elif next(module.children(), None) is not None:
            status, detail = "kept", "container"
        else:
            status, detail = "kept", "outside the residual blocks" if not plan else "not asked for"
        rows.append(ModuleOutcome(name, type(module).__name__, status, detail, _count(module)))
    return rows


def _nothing(model: nn.Module, found: _Found) -> str:
    reasons = {v.reason for v in found.values() if isinstance(v, Refusal)}
    why = "; ".join(sorted(reasons)) if reasons else "no residual block that a handler knows was found"
    own = adds_itself(model)
    hint = (
        f"Its own forward adds maps ({own}); make modules of those parts, additions included. " if own else ""
    )
    return (
        f"{type(model).__name__} has nothing to convert: {why}. {hint}"
        "Masks need residual blocks, whose forward adds a feature map to a branch of convolutions (docs/networks.md); "
        "dynamic kernels need convolutions that a config's scope or a rule by name covers"
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dense_macs(model: nn.Module, size: tuple[int, int, int] | None, routing: bool = False):
    from dynaconv.cost.dense import count_dense, guess_input_size

    size = size or guess_input_size(model)
    try:
        counts = count_dense(model, size)
    except (RuntimeError, ValueError, TypeError):
        # A network with unusual inputs is still converted; only its MACs stay unknown in the report.
        return size, None
    return size, counts.static + (counts.gates + counts.kernel_extra if routing else 0)
