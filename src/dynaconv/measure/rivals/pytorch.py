"""PyTorch as a dense rival: eager, and compiled by inductor with frozen weights."""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.measure.rivals.subject import Subject


def eager(subject: Subject, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """Channels-last, batch norm folded; `threads` is torch's own setting while it is timed."""
    model, x = subject.model, x.contiguous(memory_format=torch.channels_last)

    def run() -> Tensor:
        with torch.inference_mode():
            return model(x)

    return run


def no_compiler() -> str | None:
    """Why inductor cannot run, or None."""
    names = (os.environ.get("CXX", "g++"), "g++", "clang++")
    return None if any(shutil.which(name) for name in names) else _checks.measure_no_compiler()


def inductor(subject: Subject, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """torch.compile with inductor, weights frozen into the code, for this very shape; compiled here (a minute)."""
    import torch._dynamo

    x = x.contiguous(memory_format=torch.channels_last)
    compiled = torch.compile(subject.model, backend="inductor", dynamic=False, options={"freezing": True})

    def run() -> Tensor:
        with torch.no_grad():
            return compiled(x)

    # Every network and batch size is a new entry for the same forward, and the limit of eight is soon reached.
    with warnings.catch_warnings(), torch._dynamo.config.patch(recompile_limit=256):
        warnings.simplefilter("ignore")
        run()
    return run
