"""Make a static network dynamic in place, and undo it."""

from __future__ import annotations

from torch import nn

from dynaconv.convert.configs import GateConfig
from dynaconv.convert.handlers import Refusal, recognise
from dynaconv.convert.report import ConversionReport, ModuleOutcome
from dynaconv.convert.rules import Rules, as_rules, config_for
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import Anatomy, MaskedBlock


def dynamize_(
    model: nn.Module,
    config: GateConfig | Rules | None = None,
    *,
    input_size: tuple[int, int, int] | None = None,
) -> ConversionReport:
    """Give every residual block of `model` a gate, in place; `revert_` undoes it.

    Args:
        model: a network with residual blocks: our CIFAR ResNets, timm and torchvision ResNets, MobileNetV2.
        config: one config for all blocks (default `SpatialMasking()`), or rules {module name or "re:pattern": config
            or None}; names beat patterns, longer names beat shorter ones, patterns are tried in order.
        input_size: (C, H, W) for the MACs in the report; by default what the model itself says, else 3x224x224.
    Returns:
        ConversionReport: every module, what became of it or why not, parameters and dense MACs before and after.
    Raises:
        ValueError: nothing to convert (with the reasons), an already dynamic model, a rule that matches nothing.
    Source: arXiv 1912.03203.

    >>> import dynaconv as dc
    >>> len(dc.dynamize_(dc.create_model("resnet8_cifar")).converted)
    3
    """
    rules = as_rules(config, model)
    _refuse_converted(model)
    found = _find(model, rules)
    plan = {name: verdict for name, verdict in found.items() if isinstance(verdict, tuple)}
    if not plan:
        raise ValueError(_nothing(model, found))
    report = ConversionReport(params_before=_count(model))
    report.input_size, report.dense_macs_before = _dense_macs(model, input_size)
    outcomes = _outcomes(model, found)
    for name, (anatomy, block_config) in plan.items():
        _replace(model, name, _masked(model.get_submodule(name), anatomy, block_config))
    report.modules, report.params_after = outcomes, _count(model)
    _, report.dense_macs_after = _dense_macs(model, report.input_size, gates=True)
    return report


def revert_(model: nn.Module) -> list[str]:
    """Take all gates out again, in place; the blocks are the original modules with the original keys.

    Returns:
        Names of the blocks that were reverted (empty for a static model).
    """
    names = [name for name, module in model.named_modules() if isinstance(module, MaskedBlock)]
    for name in names:
        _replace(model, name, model.get_submodule(name).block)
    return names


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


def _find(model: nn.Module, rules: Rules) -> dict[str, tuple[Anatomy, GateConfig] | Refusal | None]:
    """Verdict for every module that is or could be a block; blocks inside blocks are left alone."""
    found: dict[str, tuple[Anatomy, GateConfig] | Refusal | None] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(taken + ".") for taken, v in found.items() if v is not None):
            continue
        verdict = recognise(module)
        if verdict is None:
            continue
        config = config_for(name, rules)
        if config is None:
            found[name] = Refusal(verdict.kind, "no rule asks for it")
        else:
            found[name] = verdict if isinstance(verdict, Refusal) else (verdict, config)
    return found


def _masked(block: nn.Module, anatomy: Anatomy, config: GateConfig) -> MaskedBlock:
    convs = [block.get_submodule(step.conv) for step in anatomy.steps]
    stride = 1
    for conv in convs:
        stride *= conv.stride[0]
    gate = config.build_gate(convs[0].in_channels, stride)
    reference = convs[0].weight
    return MaskedBlock(
        block,
        anatomy,
        gate.to(reference.device, reference.dtype),
        config=config,
        dilation_gradient=config.dilation_gradient,
    )


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._modules[leaf] = new


def _outcomes(model: nn.Module, found: dict) -> list[ModuleOutcome]:
    rows = []
    for name, module in model.named_modules():
        if not name:
            continue
        owner = next((b for b, v in found.items() if name.startswith(b + ".") and isinstance(v, tuple)), None)
        verdict = found.get(name)
        if isinstance(verdict, tuple):
            status, detail = "converted", f"{verdict[0].kind}, {verdict[1].describe()}"
        elif isinstance(verdict, Refusal):
            status, detail = "skipped", verdict.reason
        elif owner is not None:
            status, detail = "inside", f"part of {owner}"
        elif next(module.children(), None) is not None:
            status, detail = "kept", "container"
        else:
            status, detail = "kept", "outside the residual blocks"
        rows.append(ModuleOutcome(name, type(module).__name__, status, detail, _count(module)))
    return rows


def _nothing(model: nn.Module, found: dict) -> str:
    reasons = {v.reason for v in found.values() if isinstance(v, Refusal)}
    why = "; ".join(sorted(reasons)) if reasons else "no residual block that a handler knows was found"
    return (
        f"{type(model).__name__} has nothing to convert: {why}. "
        "Supported: CIFAR ResNets, timm and torchvision ResNets, MobileNetV2 (dc.convert.HANDLERS adds others)"
    )


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def _dense_macs(model: nn.Module, size: tuple[int, int, int] | None, gates: bool = False):
    from dynaconv.cost.dense import count_dense, guess_input_size

    size = size or guess_input_size(model)
    try:
        counts = count_dense(model, size)
    except (RuntimeError, ValueError, TypeError):
        # A network with unusual inputs is still converted; only its MACs stay unknown in the report.
        return size, None
    return size, counts.static + (counts.gates if gates else 0)
