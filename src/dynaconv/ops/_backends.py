"""Choosing a backend: `auto` may fall back, an explicit choice never does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from dynaconv import _checks
from dynaconv.ops import _registry


def choose(op: str, backend: str, can_run: Mapping[str, Callable[[Tensor], str | None]], x: Tensor) -> str:
    """Name of the backend to run: the first fast one that can, else "eager".

    Args:
        can_run: fast backends in order of preference, each with a function that returns why it cannot run.
    Raises:
        ValueError: unknown backend. RuntimeError: an explicit backend that cannot run, with its reason.
    """
    if backend == "eager":
        return backend
    if backend == "auto":
        # A traced graph holds the op as one node, which runs on every device.
        if _registry.traced(x):
            return "traced"
        return next((name for name, reason in can_run.items() if reason(x) is None), "eager")
    _checks.one_of("backend", backend, ("auto", "eager", *can_run))
    reason = can_run[backend](x)
    if reason is not None:
        raise _checks.grad_free_backend(op, backend, reason)
    return backend
