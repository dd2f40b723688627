"""Gates, their granularity, and budgets of the whole network."""

from __future__ import annotations

from collections.abc import Sequence


def granularity_needs_size(size: Sequence[int]) -> ValueError:
    """Error for a granularity for each resolution of a network that takes no image of the guessed size."""
    shown = "x".join(str(v) for v in size)
    return ValueError(
        f"one granularity for each resolution needs the resolutions, but the network takes no image of {shown}; "
        "give dynamize_ input_size=(C, H, W), or one granularity for all"
    )


def granularity_count(values: Sequence[int], levels: Sequence[tuple[int, int]]) -> ValueError:
    """Error for another number of granularities than resolutions."""
    shown = ", ".join(f"{h}x{w}" for h, w in levels)
    return ValueError(
        f"granularity has {len(values)} numbers, but the blocks lie on {len(levels)} resolutions ({shown}); "
        "give one number for each, finest first, or one for all"
    )


def granularity_too_large(name: str, value: int, grid: tuple[int, int], size: Sequence[int]) -> ValueError:
    """Error for decisions larger than the feature map that they are about."""
    shown = "x".join(str(v) for v in size)
    return ValueError(
        f"granularity {value} is larger than the {grid[0]}x{grid[1]} feature map of {name} (input {shown}); "
        f"choose at most {min(grid)} there, or a LayerGate, which decides for whole images"
    )


def convert_hooked(name: str, kind: str) -> ValueError:
    """Error for a conversion of modules with hooks."""
    return ValueError(
        f"{name} has a {kind} hook, which skipping would pass by; take it away (handle.remove(), or "
        "remove_weight_norm, prune.remove, ... where it computes weights), convert, and put hooks on the result"
    )


def convert_parametrized(name: str, parameters: Sequence[str]) -> ValueError:
    """Error for a conversion of modules with parametrizations."""
    return ValueError(
        f"{name} has a parametrization of {', '.join(parameters)}, which folded weights would not follow; make it "
        f"plain with torch.nn.utils.parametrize.remove_parametrizations(module, {parameters[0]!r}), then convert"
    )


def budget_nan(names: Sequence[str]) -> ValueError:
    """Error for a training step whose masks hold NaN, with the blocks in forward order."""
    others = f" and {len(names) - 1} more blocks" if len(names) > 1 else ""
    return ValueError(
        f"the masks of {names[0]}{others} hold NaN: the images or the weights are not finite; look at both with "
        "torch.isnan(...).any(), and lower the learning rate or clip gradients if it is the weights; no weight was "
        "changed by this step, but running statistics of batch norms may hold NaN now: load an earlier state_dict"
    )
