"""Choosing a backend: `auto` may fall back, an explicit choice never does."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dynaconv import _checks


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
        # Index lists have data-dependent sizes; a traced graph takes the dense form.
        if torch.compiler.is_compiling():
            return "eager"
        return next((name for name, reason in can_run.items() if reason(x) is None), "eager")
    _checks.one_of("backend", backend, ("auto", "eager", *can_run))
    reason = can_run[backend](x)
    if reason is not None:
        raise _checks.grad_free_backend(op, backend, reason)
    return backend
