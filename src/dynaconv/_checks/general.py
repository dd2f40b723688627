"""What every room checks: names, ranges, pictures, masks."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known names that look like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> ValueError:
    """Error for a name that is not known, with the nearest ones."""
    known = sorted(known)
    close = nearest(name, known)
    advice = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else _some(known)
    return ValueError(f"unknown {what} {name!r}; {advice}{' ' + hint if hint else ''}")


def _some(known: Sequence[str], count: int = 12) -> str:
    listed = ", ".join(known[:count])
    return f"known: {listed}{', ...' if len(known) > count else ''}"


def one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown(what, str(value), allowed)


def images(x: Tensor, channels: int | None = None, who: str = "this layer") -> None:
    """Raise unless x is a floating [N, C, H, W] tensor (with the given C)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who} expects a tensor [N, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{who} expects x [N, C, H, W], got {list(x.shape)}; add the missing axis")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(
            f"{who} expects x [N, {channels}, H, W], got {list(x.shape)}; "
            f"its channel count must be {channels}, not {x.shape[1]}"
        )


def mask_for(mask: Tensor, size: Sequence[int]) -> None:
    """Raise unless mask is [N, 1, h, w] on the output grid `size` = (N, h, w)."""
    n, h, w = size
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor [N, 1, H, W] = [{n}, 1, {h}, {w}], got {type(mask).__name__}")
    if tuple(mask.shape) != (n, 1, h, w):
        raise ValueError(
            f"mask must be [N, 1, H, W] = [{n}, 1, {h}, {w}] to match the output, got {list(mask.shape)}; "
            "use SpatialMask.resize or MaskUnit(stride=1)"
        )


def fraction(what: str, value: float) -> float:
    """Raise unless 0 < value <= 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number in (0, 1], got {value!r}") from None
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{what} must lie in (0, 1], got {number:g}; 0.5 means half of the conditional MACs")
    return number


def positive(what: str, value: float) -> float:
    """Raise unless value > 0."""
    if not float(value) > 0:
        raise ValueError(f"{what} must be positive, got {value!r}")
    return value


def grad_free_backend(op: str, backend: str, reason: str) -> RuntimeError:
    """Error for an explicitly chosen backend that cannot run."""
    return RuntimeError(f"{op}: backend {backend!r} cannot run here: {reason}; use backend='auto' or 'eager'")


def no_gates(what: str) -> ValueError:
    """Error for a network without anything dynamic in it."""
    return ValueError(
        f"{what} needs a dynamic network, but this model has no gates; call dc.dynamize_(model) first"
    )


def finite_mask(mask: Tensor) -> None:
    """Raise when a mask holds NaN; looks at values on the CPU only, where nobody has to wait for them."""
    if torch.compiler.is_compiling() or not mask.is_floating_point() or mask.device.type != "cpu":
        return
    if type(mask) is Tensor and bool(torch.isnan(mask).any()):
        raise ValueError(
            "the mask holds NaN; the network's input or weights are not finite: check them with torch.isnan"
        )


def finite_answers(outputs: object, what: str) -> None:
    """Raise when a network's output, a tensor or several in lists and dicts, holds NaN."""
    for leaf in tree_leaves(outputs):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and bool(torch.isnan(leaf).any()):
            raise ValueError(
                f"{what}: the network's answers hold NaN, so its masks mean nothing; check pictures and weights with "
                "torch.isnan"
            )


def integrations_missing(package: str, extra: str) -> ImportError:
    """Error for an optional package that is not installed."""
    return ImportError(
        f'{package} is not installed; install it with: pip install "dynaconv[{extra}]"', name=package
    )


def count(what: str, value: int) -> None:
    """Raise unless `value` is a whole number >= 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{what} must be a whole number >= 1, got {value!r}")


def ascending_targets(targets: list[float]) -> list[float]:
    """Raise unless there is a target and each is larger than the one before."""
    if not targets:
        raise ValueError("calibrate_ expects at least one target in (0, 1], got none")
    if any(b <= a for a, b in zip(targets, targets[1:], strict=False)):
        proper = ", ".join(f"{t:g}" for t in sorted(set(targets)))
        got = ", ".join(f"{t:g}" for t in targets)
        raise ValueError(f"targets must rise and differ, got {got}; write {proper}")
    return targets


def too_few_to_calibrate(images: int) -> ValueError:
    """Error for a calibration on (nearly) nothing."""
    if images == 0:
        return ValueError(
            "calibrate_ got no images: the loader is empty (or was used up); pass a DataLoader or a list"
        )
    return ValueError(
        "calibrate_ got one image, whose masks say nothing about others; pass a thousand images, or two at least"
    )


def total_below_floor(target: float, floor: float) -> ValueError:
    """Error for a budget of the whole network below what is always computed."""
    if floor >= 1:
        return ValueError(
            f"a total target of {target:g} cannot be met: what is always computed and what deciding costs exceed the "
            "static network's MACs; use scope='conditional' or a cheaper gate"
        )
    return ValueError(
        f"a total target of {target:g} cannot be met: {floor:.3f} of the static network's MACs are always "
        f"computed (stem, shortcuts, gates, routers, mixing); choose a target in ({floor:.3f}, 1]"
    )


def dial_range(dial: Iterable[float]) -> tuple[float, float]:
    """A pair 0 < low < high <= 1 of budgets."""
    try:
        low, high = (fraction("dial", end) for end in dial)
    except (TypeError, ValueError):
        low = high = 0.0
    if not low < high:
        raise ValueError(f"dial must be two budgets (low, high) with 0 < low < high <= 1, got {dial!r}")
    return low, high
