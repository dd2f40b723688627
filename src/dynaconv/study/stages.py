"""Where the stages of a network end, and what they put out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicConv

_STAGE = re.compile(r"(?:layer|stage)_?\d+")


def stage_outputs(model: nn.Module, size: tuple[int, int, int]) -> list[str]:
    """Names of the modules whose outputs are the stages' outputs, in order.

    Stages are siblings named layer1, layer2, ... or stage1, ...; otherwise the children of the outermost sequence that
    hold at least two convolutions, grouped by their number of output channels.

    Args:
        size: (C, H, W) of a picture the network takes.
    Raises:
        ValueError: fewer than two stages are found.
    """
    named = [name for name, _ in model.named_modules() if _STAGE.fullmatch(name.rpartition(".")[2])]
    top = min((name.count(".") for name in named), default=0)
    stages = [name for name in named if name.count(".") == top]
    if len(stages) < 2:
        stages = _grouped(model, _blocks(model), size)
    if len(stages) < 2:
        raise _checks.study_no_stages(type(model).__name__)
    return stages


def _blocks(model: nn.Module) -> list[str]:
    """Children with two convolutions or more of the outermost sequence that has at least two of them."""
    found: list[tuple[int, list[str]]] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)):
            children = [
                f"{name}.{child}".lstrip(".") for child, m in module.named_children() if _convs(m) > 1
            ]
            if len(children) > 1:
                found.append((name.count("."), children))
    return min(found, key=lambda item: (item[0], -len(item[1])), default=(0, []))[1]


def _convs(module: nn.Module) -> int:
    return sum(isinstance(m, (nn.Conv2d, DynamicConv)) for m in module.modules())


def _grouped(model: nn.Module, blocks: list[str], size: tuple[int, int, int]) -> list[str]:
    """The last of each run of blocks with equally many output channels."""
    with capture(model, blocks) as outputs:
        parameter = next(model.parameters())
        model(torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype))
        channels = [outputs[name].shape[1] for name in blocks if name in outputs]
    ends = [i for i in range(len(channels)) if i + 1 == len(channels) or channels[i] != channels[i + 1]]
    return [blocks[i] for i in ends]


def choose_layer(model: nn.Module, size: tuple[int, int, int], name: str | None) -> str:
    """`name` if the network has it, by default the output of its second-last stage.

    Raises:
        ValueError: there is no such layer (the nearest are named), or no stages to choose from.
    """
    if name is None:
        return stage_outputs(model, size)[-2]
    known = [n for n, _ in model.named_modules() if n]
    if name not in known:
        raise _checks.unknown(f"layer of {type(model).__name__}", name, known)
    return name


@contextmanager
def capture(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Outputs of the named modules in the last forward pass, in evaluation mode without gradients."""
    outputs: dict[str, Tensor] = {}
    modes = {module: module.training for module in model.modules()}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _m, _a, y, name=name: outputs.__setitem__(name, y)
        )
        for name in names
    ]
    try:
        model.eval()
        with torch.no_grad():
            yield outputs
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
