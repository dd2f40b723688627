"""A last look at what was read from a forward: with every position open it must compute what the block does."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from dynaconv.convert.probing import GRID
from dynaconv.nn.block_program import Program
from dynaconv.nn.masked_program import run_dense

_FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError)


def computes_the_same(program: Program, block: nn.Module) -> bool:
    """Compare a copy's own forward with its program on a small random map; True where the copy cannot be run.

    Tracing sees `y *= 2` as a new value, and cannot know that another name of y changes, too.
    """
    if any(t.is_meta for t in (*block.parameters(), *block.buffers())):
        return True
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, program.in_channels, *GRID, generator=generator)
    grid = ((n - 1) // program.stride + 1 for n in GRID)
    with torch.no_grad():
        try:
            twin = copy.deepcopy(block).cpu().float().eval()
            for parameter in twin.parameters():
                # Gains and scales that start at zero would hide the branch.
                if parameter.dim() < 2 or not parameter.any():
                    parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            want = twin(x.clone())
        except _FAILURES:
            return True
        got = run_dense(program, twin, x.clone(), torch.ones(2, 1, *grid), {})
    if not isinstance(want, Tensor) or want.shape != got.shape:
        return False
    # Weights that are not finite say nothing about the forward.
    return not bool(want.isfinite().all()) or torch.allclose(
        got, want, rtol=1e-3, atol=1e-3 * float(want.abs().max())
    )


__all__ = ["computes_the_same"]
