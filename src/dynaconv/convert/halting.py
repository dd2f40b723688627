"""Halting (SACT, ACT) as a conversion: which blocks make up a stage, and what runs them."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from dynaconv import _checks
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.gate_configs import fill_preset
from dynaconv.convert.replace import replace_module
from dynaconv.nn._fold import activation_name
from dynaconv.nn.halting import GRADIENTS, LEVELS, HaltingSequential, HaltingUnit, is_halting
from dynaconv.nn.masked_block import Anatomy

PRESETS = {"paper": {"gradient": "none"}, "default": {"gradient": "straight_through"}}


@dataclass(frozen=True)
class Halting(GateConfig):
    """Halting scores over the blocks of a stage: SACT for each position, ACT for each image (arXiv 1612.02297).

    Blocks of one resolution that follow each other in an `nn.Sequential` are a stage; its first one always runs.

    Args:
        level: "position" (SACT) or "image" (ACT).
        preset: "paper" trains the scores by the ponder cost alone (`MacBudget(ponder=...)`), "default" also lets the
            budget loss reach them.
        gradient: of the decision, "none" or "straight_through".
        temperature: of the straight-through gradient, > 0.
    Raises:
        ValueError: an unknown level, preset or gradient; temperature not positive.

    >>> import dynaconv as dc
    >>> dc.dynamize_(dc.create_model("resnet14_cifar"), Halting()).converted
    ['layer1.1', 'layer2.1', 'layer3.1']
    """

    kind: ClassVar[str] = "halting"
    dilation_gradient: ClassVar[str | None] = "marginal"

    level: str = "position"
    preset: str = "default"
    gradient: str | None = None
    temperature: float = 0.25

    def __post_init__(self) -> None:
        fill_preset(self, PRESETS)
        _checks.one_of("level", self.level, LEVELS)
        _checks.one_of("gradient of the decision", self.gradient, GRADIENTS)
        _checks.positive("temperature", self.temperature)

    def build_gate(self, in_channels: int, stride: int) -> HaltingUnit:
        """The gate of a unit behind the first."""
        return HaltingUnit(
            in_channels, level=self.level, gradient=self.gradient, temperature=self.temperature
        )

    def obstacle(self, model: nn.Module, name: str, block: nn.Module, anatomy: Anatomy) -> str | None:
        """Only blocks behind the first of their stage can halt."""
        parent, _, leaf = name.rpartition(".")
        holder = model.get_submodule(parent)
        if not parent or type(holder) not in (nn.Sequential, HaltingSequential):
            kind = type(holder).__name__
            return (
                f"halting needs the blocks of a stage in an nn.Sequential inside the network, not in {kind}"
            )
        if next(iter(holder._modules)) == leaf:
            return "the first unit of its stage always runs"
        if (
            anatomy.shortcut is not None
            or any(
                tuple(getattr(block.get_submodule(step.conv), "stride", (1, 1))) != (1, 1)
                for step in anatomy.steps
            )
            or _changes_shape(anatomy)
        ):
            return (
                "it changes resolution or channels, so it is the first unit of its stage, which always runs"
            )
        if _changes_halted(block, anatomy):
            return "what surrounds its branch would change positions that have halted"
        act = None if anatomy.act is None else activation_name(block.get_submodule(anatomy.act))
        if act not in (None, "none", "relu", "relu6"):
            return f"its final activation {act} would change positions that have halted"
        return None

    def finish_(self, model: nn.Module, names: list[str]) -> None:
        """Let the containers of the blocks `names` run them as stages."""
        for parent in dict.fromkeys(name.rpartition(".")[0] for name in names):
            holder = model.get_submodule(parent)
            if not isinstance(holder, HaltingSequential):
                _replace(model, parent, HaltingSequential(OrderedDict(holder._modules)), holder)

    def describe(self) -> str:
        """For the conversion report."""
        return (
            "halting for each position (SACT)" if self.level == "position" else "halting for each image (ACT)"
        )


def _changes_shape(anatomy: Anatomy) -> bool:
    program = anatomy.program
    if program is None:
        return False
    widths = [op.shape[1] for op in program.before if op.name == program.shortcut]
    return program.stride != 1 or widths not in ([], [program.in_channels])


def _changes_halted(block: nn.Module, anatomy: Anatomy) -> bool:
    """More than a ReLU behind the addition, or layers before the shortcut, of a block that is more than a chain."""
    if anatomy.is_chain:
        return False
    names = [
        activation_name(block.get_submodule(op.target)) if op.call == "module" else None
        for op in anatomy.program.after
    ]
    always = any(op.weights for op in anatomy.program.before)
    return always or anatomy.program.replaces or any(name not in ("none", "relu", "relu6") for name in names)


def revert_halting(model: nn.Module) -> None:
    """Put ordinary containers back where no halting block is left."""
    for name, module in list(model.named_modules()):
        if isinstance(module, HaltingSequential) and not any(is_halting(child) for child in module):
            _replace(model, name, nn.Sequential(OrderedDict(module._modules)), module)


def _replace(model: nn.Module, name: str, new: nn.Module, old: nn.Module) -> None:
    new.training = old.training
    replace_module(model, name, new)


def halting_stages(model: nn.Module) -> dict[str, list[str]]:
    """Names of the units behind the first of every stage, in order, by the name of the first of them."""
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, HaltingSequential):
            continue
        stage: list[str] = []
        for leaf, child in module.named_children():
            stage = [*stage, f"{name}.{leaf}"] if is_halting(child) else []
            if stage:
                found[stage[0]] = stage
    return found
