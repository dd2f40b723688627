"""Masked blocks whose convolutions have a kernel per sample: which coefficients, and running only open positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dynaconv.nn._fold import activation_name, norm_activation
from dynaconv.nn.dynamic_conv import DynamicConv, norm_scale_and_shift
from dynaconv.nn.spatial_mask import SpatialMask
from dynaconv.ops import ACTIVATIONS, masked_conv2d
from dynaconv.ops._conv import Geometry
from dynaconv.ops.mask_ops import branch_masks, branch_sizes


def needs_of(mask: Tensor, size: Sequence[int], convs: Sequence[nn.Module]) -> list[Tensor]:
    """The mask that every convolution of a branch runs on, in order; mask [N, 1, h, w] is the last one's."""
    geometries = [Geometry.of(conv) for conv in convs]
    # Tracing knows no as_subclass, and the masks that it sees are no SpatialMask.
    plain = mask.as_subclass(Tensor) if isinstance(mask, SpatialMask) else mask
    return branch_masks(plain, branch_sizes(tuple(size), geometries), geometries)


def coefficients(
    conv: DynamicConv, path: str, shared: dict[str, Tensor], x: Tensor, open_: Tensor | None
) -> Tensor:
    """A shared router's, or those of the layer's own router, pooled over the positions of x that were computed."""
    return shared[path] if path in shared else conv.route(x, open_)


def run_shortcut(x: Tensor, shortcut: nn.Module, path: str, shared: dict[str, Tensor]) -> Tensor:
    """The projection of x; its convolution may have a kernel per sample, with a shared router's coefficients."""
    if path in shared:
        return shortcut(x, routing=shared[path])
    if not any(layer.startswith(f"{path}.") for layer in shared):
        return shortcut(x)
    for name, part in shortcut.named_children():
        routing = shared.get(f"{path}.{name}")
        x = part(x) if routing is None else part(x, routing=routing)
    return x


def sparse_branch(
    x: Tensor,
    convs: Sequence[tuple[str, nn.Module, nn.Module | None, nn.Module | None]],
    shared: dict[str, Tensor],
    needs: Sequence[Tensor],
) -> Tensor:
    """The branch of a masked block, image by image and only at open positions; zero elsewhere.

    Args:
        x: [N, C, H, W]. convs: path, convolution, batch norm, activation of each step. shared: coefficients by path.
        needs: the mask each convolution runs on.
    """
    hidden, open_ = x, None
    for (path, conv, norm, act), need in zip(convs, needs, strict=True):
        routing = coefficients(conv, path, shared, hidden, open_) if isinstance(conv, DynamicConv) else None
        pieces = [
            masked_conv2d(
                hidden[i : i + 1],
                need[i : i + 1],
                weight,
                bias,
                conv.stride,
                Geometry.of(conv).padding,
                conv.dilation,
                conv.groups,
            )
            for i, (weight, bias) in enumerate(_folded(conv, norm, routing, x.shape[0]))
        ]
        hidden, open_ = _activate(torch.cat(pieces), need, norm, act), need
    return hidden


def _folded(
    conv: nn.Module, norm: nn.Module | None, routing: Tensor | None, n: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weight and bias of each image, batch norm folded in."""
    weights, biases = conv.kernels(routing) if routing is not None else (conv.weight, conv.bias)
    if norm is not None and not isinstance(norm, nn.Identity):
        scale, shift = norm_scale_and_shift(norm)
        weights = weights * scale[:, None, None, None]
        biases = shift if biases is None else biases * scale + shift
    for i in range(n):
        weight = weights if routing is None else weights[i]
        yield weight, biases[i] if biases is not None and biases.dim() == 2 else biases


def _activate(hidden: Tensor, need: Tensor, norm: nn.Module | None, act: nn.Module | None) -> Tensor:
    inner = norm_activation(norm)
    name = activation_name(inner if act is None and inner is not None else act)
    assert name is not None
    # An activation that is not zero at zero must not open closed positions.
    return ACTIVATIONS[name](hidden) if name != "sigmoid" else torch.sigmoid(hidden) * need
