"""Inverted residuals (MobileNetV2) as written in timm and torchvision."""

from __future__ import annotations

from torch import nn

from dynaconv.convert.handlers._common import Refusal, Verdict, check_steps, obstacle, present
from dynaconv.nn.masked_block import Anatomy, Step

_KIND = "inverted_residual"
_NO_SHORTCUT = "no shortcut (stride or channels change), so nothing could pass where the mask is closed"
_OBSTACLES = ("se", "aa", "drop_path")


def timm_inverted_residual(block: nn.Module) -> Verdict:
    """timm's `conv_pw bn1 conv_dw bn2 conv_pwl bn3` with `has_skip`."""
    if not (present(block, "conv_pw") and present(block, "conv_dw") and present(block, "conv_pwl")):
        return None
    if not getattr(block, "has_skip", False):
        return Refusal(_KIND, _NO_SHORTCUT)
    reason = obstacle(block, _OBSTACLES)
    if reason is not None:
        return Refusal(_KIND, reason)
    return check_steps(
        block, Anatomy(_KIND, (Step("conv_pw", "bn1"), Step("conv_dw", "bn2"), Step("conv_pwl", "bn3")))
    )


def timm_depthwise_separable(block: nn.Module) -> Verdict:
    """timm's `conv_dw bn1 conv_pw bn2`, the first block of MobileNetV2."""
    if not (present(block, "conv_dw") and present(block, "conv_pw")) or present(block, "conv_pwl"):
        return None
    if not getattr(block, "has_skip", False):
        return Refusal("depthwise_separable", _NO_SHORTCUT)
    reason = obstacle(block, _OBSTACLES)
    if reason is not None:
        return Refusal("depthwise_separable", reason)
    return check_steps(
        block, Anatomy("depthwise_separable", (Step("conv_dw", "bn1"), Step("conv_pw", "bn2")))
    )


def torchvision_inverted_residual(block: nn.Module) -> Verdict:
    """torchvision's `conv = Sequential(ConvNormActivation..., Conv2d, BatchNorm2d)` with `use_res_connect`."""
    chain = getattr(block, "conv", None)
    if not hasattr(block, "use_res_connect") or not isinstance(chain, nn.Sequential):
        return None
    if not block.use_res_connect:
        return Refusal(_KIND, _NO_SHORTCUT)
    steps = []
    for i, part in enumerate(chain[:-2]):
        names = [name for name, _ in part.named_children()]
        steps.append(Step(*(f"conv.{i}.{name}" for name in names[:3])))
    steps.append(Step(f"conv.{len(chain) - 2}", f"conv.{len(chain) - 1}"))
    return check_steps(block, Anatomy(_KIND, tuple(steps)))
