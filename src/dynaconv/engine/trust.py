"""What a file says about its weights and tensors must hold: the kernels read as much as a plan's geometry asks for."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.engine import pack
from dynaconv.engine.pack_experts import expected_shapes
from dynaconv.engine.pack_fusion import expansion_shapes, reduction_shapes
from dynaconv.engine.plan import KINDS, Conv, Plan, Step

# How the weights of each convolution of a step must be packed; kinds that are not listed read none.
_FORMS = {
    "conv": ("conv",),
    "stem": ("stem",),
    "depthwise": ("depthwise",),
    "inverted": ("conv", "depthwise", "conv"),
    "gate": ("gate",),
    "layer_norm": ("norm",),
    "dynamic_conv": ("experts", "expert_biases"),
    "fusion_factors": ("none", "reduction"),
    "router": ("conv", "conv", "conv"),
    "resample": ("taps",),
}
# Folded to a kernel for each image, and factored.
_FUSIONS = (("experts", "reduction", "expansion"), ("conv", "conv", "expansion"))


def check_weights(plan: Plan) -> None:
    """Raise IndexError or ValueError unless every step finds the weights that its kernel will read."""
    for i, step in enumerate(plan.steps):
        forms = _FORMS.get(step.kind, ())
        if step.kind == "channel_fusion":
            forms = _FUSIONS[1 if step.ints[3] else 0]
        if step.kind == "narrow":
            forms = _FORMS.get(KINDS[step.ints[0]], ())
        if step.kind == "fusion_factors" and step.input >= 0:
            forms = ("none", "conv")
        if step.kind == "activate" and step.ints[0] == 2:
            forms = ("slopes",)
        if step.kind == "inverted" and step.ints[0]:
            forms = ("conv", "depthwise", "expansion")
        for index, form in zip(step.conv, forms, strict=False):
            if index >= 0:
                _check(plan, step, plan.convs[index], form, f"step {i}")


def _check(plan: Plan, step: Step, conv: Conv, form: str, where: str) -> None:
    decides = step.out if step.kind in ("stem", "fusion_factors") else step.input
    half = plan.values[decides].dtype == "bfloat16" and form in _PACKED
    dtype = torch.bfloat16 if half else torch.float32
    if conv.form != form:
        raise _checks.engine_weights(f"the weights of {where}", f"packed for {form}", conv.form)
    for name, tensor, shape in _expected(plan, conv, step, half):
        kind = torch.float32 if name == "bias" else dtype
        if tensor is None or tensor.dtype != kind or tuple(tensor.shape) != shape:
            got = None if tensor is None else f"{list(tensor.shape)} of {tensor.dtype}"
            raise _checks.engine_weights(f"the {name} of {where}", f"{list(shape)} of {kind}", got)


def _expected(
    plan: Plan, conv: Conv, step: Step, half: bool
) -> list[tuple[str, Tensor | None, tuple[int, ...]]]:
    """(name, tensor, shape) of what the kernels read."""
    if conv.form == "norm":
        return [("weight", conv.weight, (conv.in_channels,)), ("bias", conv.bias, (conv.in_channels,))]
    if conv.form == "slopes":
        return [("bias", conv.bias, (conv.in_channels,))]
    if conv.form == "taps":
        return [("weight", conv.weight, (conv.out_channels, 2))]
    taps = conv.kernel[0] * conv.kernel[1]
    if conv.form == "gate":
        rows, biases = taps + int(step.ints[0] != 0), 1 + taps * int(step.ints[1] != 0)
        return [("weight", conv.weight, (rows, conv.in_channels)), ("bias", conv.bias, (biases,))]
    if conv.form in ("experts", "expert_biases"):
        weight, bias = expected_shapes(conv, step.ints[0])
    elif conv.form == "reduction":
        weight, bias = reduction_shapes(conv)
    elif conv.form == "expansion":
        weight, bias = expansion_shapes(conv, plan.convs[step.conv[0]].groups)
    else:
        weight, bias = _PACKED[conv.form](conv, half)
    found = [("weight", conv.weight, weight), ("bias", conv.bias, bias)]
    if conv.winograd is not None:
        panels = -(-conv.out_channels // pack.PANEL)
        depth = ((conv.in_channels + 1) // 2, pack.PANEL, 2) if half else (conv.in_channels, pack.PANEL)
        found.append(("winograd", conv.winograd, (panels, 16, *depth)))
        # Weights that no run would read were dropped.
        found = found[1:] if conv.weight is None else found
    return found


Shapes = tuple[tuple[int, ...], tuple[int, ...]]


def _panels(conv: Conv, half: bool) -> Shapes:
    groups, inner, (kh, kw) = conv.groups, conv.in_channels // conv.groups, conv.kernel
    panels = -(-(conv.out_channels // groups) // pack.PANEL)
    bias = (groups, panels * pack.PANEL)
    if not half:
        return (groups, panels, kh * kw * inner, pack.PANEL), bias
    taps, depth = (kh, kw * inner) if conv.form == "stem" else (kh * kw, inner)
    return (groups, panels, taps, (depth + 1) // 2, pack.PANEL, 2), bias


def _depthwise(conv: Conv, half: bool) -> Shapes:
    channels, (kh, kw) = conv.out_channels, conv.kernel
    if not half:
        return (kh * kw, channels), (channels,)
    panels, pairs = -(-channels // pack.PANEL), kh // 2 * kw + (kh % 2) * ((kw + 1) // 2)
    return (panels, pairs, 2, 16, 2), (panels * pack.PANEL,)


_PACKED: dict[str, Callable[[Conv, bool], Shapes]] = {
    "conv": _panels,
    "stem": _panels,
    "depthwise": _depthwise,
}


def check_externals(plan: Plan) -> None:
    """Raise IndexError or ValueError unless every value outside of the arena has a tensor of its size."""
    values = [i for i, v in enumerate(plan.values) if v.external >= 0]
    if sorted(e.value for e in plan.externals) != values:
        raise _checks.engine_weights("the external tensors", f"those of values {values}", plan.externals)
    for i, external in enumerate(plan.externals):
        value = plan.values[external.value]
        size = (value.channels, *value.size)
        if value.external != i or value.stride != value.channels:
            raise _checks.engine_weights(f"external tensor {i}", "dense rows of its value", value)
        if external.source == "input" and size != tuple(plan.image):
            raise _checks.engine_weights(f"external tensor {i}", f"images {list(plan.image)}", list(size))
