"""Optimizer and learning rate of a recipe."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dynaconv.budget import MacBudget
from dynaconv.train.recipe import OptimSection


def build_optimizer(
    section: OptimSection, model: nn.Module, budget: MacBudget | None = None
) -> torch.optim.Optimizer:
    """The optimizer; with a budget, the gates are a parameter group of their own."""
    if budget is None:
        trainable = [p for p in model.parameters() if p.requires_grad]
        groups: Iterable[dict[str, Any]] = [{"params": trainable, "weight_decay": section.weight_decay}]
    else:
        groups = budget.param_groups(
            section.lr,
            section.weight_decay,
            gate_lr_multiplier=section.gate_lr_multiplier,
            gate_weight_decay=section.gate_weight_decay,
        )
    if section.name == "sgd":
        nesterov = section.nesterov and section.momentum > 0
        return torch.optim.SGD(groups, lr=section.lr, momentum=section.momentum, nesterov=nesterov)
    kind = torch.optim.AdamW if section.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=section.lr)


def lr_factor(section: OptimSection, step: int, steps_per_epoch: int, total_steps: int) -> float:
    """Learning rate of a step (from 0) as a multiple of `section.lr`.

    >>> [round(lr_factor(OptimSection(schedule="cosine"), s, 10, 40), 3) for s in (0, 20, 40)]
    [1.0, 0.5, 0.0]
    """
    warmup = round(section.warmup_epochs * steps_per_epoch)
    if step < warmup:
        return (step + 1) / warmup
    if section.schedule == "multistep":
        return section.gamma ** sum(step >= epoch * steps_per_epoch for epoch in section.milestones)
    if section.schedule == "cosine":
        done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0
