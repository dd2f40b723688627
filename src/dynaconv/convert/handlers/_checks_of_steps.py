"""What an anatomy that was written by hand must pass before it is believed."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.convert.anatomy import Refusal, Verdict
from dynaconv.nn._fold import activation_name, norm_activation
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_block import Anatomy


def check_steps(block: nn.Module, anatomy: Anatomy) -> Verdict:
    """The anatomy, or a refusal when some convolution, norm or activation cannot be executed on rows."""
    for step in anatomy.steps:
        conv, norm, act = (
            None if p is None else block.get_submodule(p) for p in (step.conv, step.norm, step.act)
        )
        if type(conv) is not nn.Conv2d and not isinstance(conv, DynamicConv):
            return Refusal(anatomy.kind, f"{step.conv} is {type(conv).__name__}, expected nn.Conv2d")
        if conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return Refusal(anatomy.kind, f"{step.conv} has padding {conv.padding!r} ({conv.padding_mode})")
        if norm is not None and not (isinstance(norm, _BatchNorm) and norm.track_running_stats):
            return Refusal(anatomy.kind, f"{step.norm} is {type(norm).__name__}, expected batch norm")
        for part in (act, norm_activation(norm)):
            if part is not None and activation_name(part) is None:
                return Refusal(anatomy.kind, f"activation {type(part).__name__} is not supported")
    if anatomy.act is not None and activation_name(block.get_submodule(anatomy.act)) is None:
        return Refusal(anatomy.kind, "its final activation is not supported")
    return check_projection(block, anatomy)


def check_projection(block: nn.Module, anatomy: Anatomy) -> Verdict:
    """The anatomy, or a refusal when the shortcut is neither identity nor 1x1 convolution + batch norm."""
    if anatomy.shortcut is None:
        return anatomy
    projection = block.get_submodule(anatomy.shortcut)
    single = isinstance(projection, nn.Conv2d | DynamicConv)
    parts = [projection] if single else list(projection.children())
    parts = [p for p in parts if not isinstance(p, nn.Identity)]
    plain = (
        parts
        and (type(parts[0]) is nn.Conv2d or isinstance(parts[0], DynamicConv))
        and not isinstance(parts[0].padding, str)
        and len(parts) <= 2
        and all(isinstance(p, _BatchNorm) and norm_activation(p) is None for p in parts[1:])
    )
    if not plain:
        return Refusal(anatomy.kind, f"its {anatomy.shortcut} is not a convolution with batch norm")
    return anatomy
