"""The operators that torch knows by name: `torch.ops.dynaconv.*`.

Each op's folder registers its own with `register`: schema, what it computes in PyTorch operations, shapes for
compilers, gradients, multiply-adds and the operations it stands for. The compiled library (csrc/torch) takes
over for CPU tensors where it is there; graphs look the same without it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch._decomp
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

_LIBRARY = torch.library.Library("dynaconv", "FRAGMENT")
# Only the compiled library has these, and no graph contains them: fewer words for calls without gradient.
_LIBRARY.define(
    "pack_branch(Tensor[] weights, Tensor[] biases, int[] strides, int[] paddings, int[] dilations, int[] groups, "
    "int[] activations, int activation) -> Tensor"
)
_LIBRARY.define(
    "run_branch(Tensor x, Tensor mask, Tensor shortcut, Tensor packed, float break_even) -> Tensor"
)
_LIBRARY.define(
    "squeeze_mask(Tensor x, Tensor weight, Tensor linear, Tensor bias, int stride, Tensor threshold) -> Tensor"
)
SQUEEZE_MASK = torch.ops.dynaconv.squeeze_mask.default
RUN_BRANCH = torch.ops.dynaconv.run_branch.default
_DECOMPOSITIONS: dict[Any, Callable[..., Tensor]] = {}


def register(
    name: str,
    arguments: str,
    *,
    eager: Callable[..., Tensor],
    fake: Callable[..., Tensor],
    saved: Callable[..., None],
    backward: Callable[..., tuple],
    flops: Callable[..., int],
    decomposition: Callable[..., Tensor],
) -> torch._ops.OpOverload:
    """Define `dynaconv::name` and return it.

    Args:
        arguments: of the schema, as in "Tensor x, int stride".
        eager: the op in PyTorch operations, on any device; also its overload `eager`, to which the compiled library
            turns for what it cannot run. The result must not be, or share memory with, an argument.
        fake: an empty tensor of the result's shape, type and memory format.
        saved, backward: as `torch.library.register_autograd` takes them.
        flops: 2 x multiply-adds from shapes, every position counted.
        decomposition: the op as a graph of aten operations, for consumers that do not know it.
    """
    for overload in ("", ".eager"):
        tags = (torch.Tag.pt2_compliant_tag,)
        _LIBRARY.define(f"{name}{overload}({arguments}) -> Tensor", tags=tags)
        _LIBRARY.impl(f"{name}{overload}", eager, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dynaconv::{name}", fake, lib=_LIBRARY)
    torch.library.register_autograd(f"dynaconv::{name}", backward, setup_context=saved, lib=_LIBRARY)
    packet = getattr(torch.ops.dynaconv, name)
    register_flop_formula(packet)(flops)
    # torch.onnx.export looks here by itself. Shapes are still to come from `fake`, hence the entry among the metas.
    torch._decomp.register_decomposition(packet.default)(decomposition)
    torch._decomp.meta_table[packet.default] = fake
    _DECOMPOSITIONS[packet.default] = decomposition
    return packet.default


def decompositions() -> dict[Any, Callable[..., Tensor]]:
    """What `ExportedProgram.run_decompositions` takes to write every op of this package in aten operations.

    >>> sorted(str(op) for op in decompositions())[0]
    'dynaconv.channel_fusion.default'
    """
    return dict(_DECOMPOSITIONS)


def below_autograd(op: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """Call an op that needs no gradient; saves the detour through Python that recording one takes."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*arguments)


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether some tensor requires a gradient."""
    return any(t is not None and t.requires_grad for t in tensors)


def traced(x: Tensor) -> bool:
    """A compiler or exporter is looking, and would see an op of this package as one node."""
    return torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)


def rows(y: Tensor) -> Tensor:
    """y with the channels innermost, as the compiled kernels write it."""
    return y.contiguous(memory_format=torch.channels_last)


def empty_rows(like: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    """Shape of a result [N, channels, h, w] for compilers, channels innermost."""
    shape = (like.shape[0], channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
