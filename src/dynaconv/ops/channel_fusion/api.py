"""Dynamic channel fusion: checks, the choice of form, and what each form costs."""

from __future__ import annotations

import math

from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _registry
from dynaconv.ops.channel_fusion import reference
from dynaconv.ops.channel_fusion.op import OP
from dynaconv.ops.channel_fusion.reference import Affine, Norm
from dynaconv.ops.dynamic_conv2d import per_sample_conv
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry

FORMS = ("auto", "factored", "folded")


def factored_macs(in_channels: int, out_channels: int, latent_channels: int, positions: int) -> int:
    """Multiply-adds of Q, the fusion matrix and P for one image with `positions` outputs a channel.

    >>> factored_macs(16, 96, 8, 112 * 112)
    12042240
    """
    per_position = latent_channels * (in_channels + latent_channels + out_channels)
    return per_position * positions


def folded_macs(in_channels: int, out_channels: int, latent_channels: int, taps: int = 1) -> int:
    """Multiply-adds that build one image's kernel, whatever its size.

    >>> folded_macs(16, 96, 8)
    19968
    """
    return out_channels * (latent_channels**2 + latent_channels * in_channels + in_channels * taps)


def cheaper_form(
    in_channels: int, out_channels: int, latent_channels: int, taps: int, positions: int, groups: int = 1
) -> str:
    """The form with fewer multiply-adds; a grouped kernel cannot hold the dense residual, so it is factored.

    >>> cheaper_form(16, 96, 8, 1, 112 * 112), cheaper_form(960, 160, 40, 1, 7 * 7)
    ('folded', 'factored')
    """
    folded = folded_macs(in_channels, out_channels, latent_channels, taps)
    factored = factored_macs(in_channels, out_channels, latent_channels, positions)
    return "folded" if groups == 1 and folded < factored else "factored"


def fused_kernels(
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    fusion: Tensor,
    *,
    norms: tuple[Affine | None, Affine | None] = (None, None),
) -> tuple[Tensor, Tensor | None]:
    """One kernel and one bias for each image, equal to `channel_fusion`.

    Args:
        weight: W0 [O, I, *k]; bias: b0 [O] or None (scaled like W0).
        q: [L, I] or [L, I, 1, ...]; p: [O, L] or [O, L, 1, ...].
        scale: Lambda [B, O]; fusion: Phi [B, L, L].
        norms: the norms after Q and after Phi, in evaluation mode.
    Returns:
        kernels [B, O, I, *k] and bias [B, O] (None when nothing shifts).
    Source: arXiv 2103.08756, eq. 6; the norms of github.com/liyunsheng13/dcd.
    """
    _check_parts(weight, q, p, scale, fusion)
    _checks.fusion_ungrouped(weight.shape[1], q.shape[1])
    return reference.folded(weight, bias, q, p, scale, fusion, norms)


def channel_fusion(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    q: Tensor,
    p: Tensor,
    scale: Tensor,
    fusion: Tensor,
    stride=1,
    padding=0,
    dilation=1,
    groups: int = 1,
    *,
    norms: tuple[Norm | None, Norm | None] = (None, None),
    form: str = "auto",
    execution: str = "auto",
) -> Tensor:
    """Lambda * (W0 x + b0) + P (norm2(Phi u) + u), with u = norm1(Q x): dynamic channel fusion.

    A kernel with several taps is dynamic at its centre tap only: Q reads the positions under it. Compilers and
    exporters see one node, `dynaconv::channel_fusion`, where execution is "auto" and the norms are `Affine` or None.

    Args:
        x: [B, I, *size].
        weight: W0 [O, I / groups, *k]; bias: b0 [O] or None.
        q: [L, I] or [L, I, 1, ...]; p: [O, L] or [O, L, 1, ...].
        scale: Lambda [B, O]; fusion: Phi [B, L, L].
        stride, padding, dilation: int, or one number an axis.
        norms: the norms after Q and after Phi: modules in training, `Affine` in evaluation, None for none.
        form: "factored" (as trained), "folded" (one kernel for each image) or "auto", the one with fewer
            multiply-adds; without `Affine` norms, and with groups, auto is factored.
        execution: how folded kernels are applied, see `per_sample_conv`.
    Returns:
        [B, O, *output size].
    Raises:
        ValueError: shapes that do not fit, an unknown form, or "folded" where it cannot run.
    Source: arXiv 2103.08756, eq. 6; the norms of github.com/liyunsheng13/dcd.

    >>> import torch
    >>> x, scale, fusion = torch.ones(1, 2, 3, 3), torch.ones(1, 1), torch.zeros(1, 1, 1)
    >>> channel_fusion(x, torch.ones(1, 2, 1, 1), None, torch.ones(1, 2), torch.ones(1, 1), scale, fusion).mean()
    tensor(4.)
    """
    _checks.one_of("form", form, FORMS)
    _check_parts(weight, q, p, scale, fusion)
    absorbable = all(norm is None or isinstance(norm, Affine) for norm in norms)
    if form == "folded":
        _checks.fusion_foldable(groups, absorbable)
    geometry = ConvGeometry.of(weight.dim() - 2, stride, padding, dilation, groups)
    if absorbable and execution == "auto" and x.dim() == 4 and _registry.traced(x):
        parts = [part for norm in norms for part in (norm or Affine())]
        return OP(x, weight, bias, q, p, scale, fusion, *parts, *geometry.numbers)
    if form == "auto" and absorbable:
        positions = math.prod(geometry.output_size(x.shape[2:], weight.shape[2:]))
        taps = math.prod(weight.shape[2:])
        form = cheaper_form(q.shape[1], weight.shape[0], q.shape[0], taps, positions, groups)
    if form != "folded":
        return reference.factored(x, weight, bias, q, p, scale, fusion, geometry, norms)
    kernels, shift = reference.folded(weight, bias, q, p, scale, fusion, norms)
    return per_sample_conv(x, kernels, shift, stride, padding, dilation, groups, execution=execution)


def _check_parts(weight: Tensor, q: Tensor, p: Tensor, scale: Tensor, fusion: Tensor) -> None:
    outputs, latent = weight.shape[0], q.shape[0]
    _checks.fusion_shape("p", p.shape[:2], (outputs, latent))
    _checks.fusion_shape("scale", scale.shape[1:], (outputs,), "[B, O]")
    _checks.fusion_shape("fusion", fusion.shape[1:], (latent, latent), "[B, L, L]")
