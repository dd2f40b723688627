"""Block-granular masks: which granularity fits which block (arXiv 2210.06223, section 3.2)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert.gate_config import GateConfig


def fit_granularity(
    model: nn.Module, configs: dict[str, GateConfig], input_size: tuple[int, int, int]
) -> dict[str, GateConfig]:
    """The configs with one granularity each: those that name one for each resolution get their block's.

    Args:
        configs: by name of block. input_size: (C, H, W).
    Raises:
        ValueError: as many numbers as there are resolutions are needed; a granularity above the block's feature map.
    """
    coarse = {n: c for n, c in configs.items() if getattr(c, "granularity", 1) != 1}
    if not coarse:
        return configs
    grids = output_grids(model, coarse, input_size)
    if grids is None:
        if any(isinstance(c.granularity, tuple) for c in coarse.values()):
            raise _checks.granularity_needs_size(input_size)
        return configs
    fitted = dict(configs)
    for config in dict.fromkeys(coarse.values()):
        own = [name for name, other in coarse.items() if other == config]
        levels = list(dict.fromkeys(grids[name] for name in own))
        values = config.granularity
        if isinstance(values, tuple) and len(values) != len(levels):
            raise _checks.granularity_count(values, levels)
        for name in own:
            value = values[levels.index(grids[name])] if isinstance(values, tuple) else values
            if value > min(grids[name]):
                raise _checks.granularity_too_large(name, value, grids[name], input_size)
            fitted[name] = dataclasses.replace(config, granularity=value)
    return fitted


def output_grids(
    model: nn.Module, names: Iterable[str], input_size: tuple[int, int, int]
) -> dict[str, tuple[int, int]] | None:
    """(h, w) that each module gives for an image of input_size; None where the model takes no such image."""
    found: dict[str, tuple[int, int]] = {}

    def keep(name: str):
        return lambda _module, _args, output: found.__setitem__(name, tuple(output.shape[2:]))

    modes = {m: m.training for m in model.modules()}
    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        with torch.no_grad():
            model.eval()(_zeros(model, input_size))
    except (RuntimeError, ValueError, TypeError):
        return None
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return found


def _zeros(model: nn.Module, input_size: tuple[int, int, int]) -> Tensor:
    parameter = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *input_size, device=parameter.device, dtype=parameter.dtype)


def as_granularity(value: object) -> int | tuple[int, ...]:
    """A whole number >= 1, or one for each resolution.

    Raises:
        ValueError: anything else.
    """
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    whole = all(
        isinstance(v, (int, float)) and not isinstance(v, bool) and v >= 1 and int(v) == v for v in values
    )
    if not values or not whole:
        raise ValueError(
            f"granularity must be a whole number of pixels >= 1, or one for each resolution, got {value!r}"
        )
    values = tuple(int(v) for v in values)
    return values if isinstance(value, (list, tuple)) else values[0]
