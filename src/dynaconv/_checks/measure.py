"""Measuring: engines that cannot run, and what is told about them."""

from __future__ import annotations

from collections.abc import Iterable


def measure_not_installed(packages: Iterable[str], extra: str) -> str:
    """Why an engine is left out whose packages are missing."""
    return f"needs {', '.join(packages)}: pip install 'dynaconv[{extra}]'"


def measure_no_compiler() -> str:
    """Why torch.compile is left out without a compiler."""
    return "needs a C++ compiler such as g++"


def measure_no_bfloat16() -> str:
    """Why an engine's bfloat16 is left out where it would compute in float32 like its other entry."""
    return "this processor has no bfloat16 arithmetic, so it computes in float32 as the other entry does"


def measure_failed(error: BaseException) -> str:
    """Why an engine is left out that raised."""
    text = " ".join(str(error).split())
    return f"failed: {type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"


def measure_deviates(deviation: float, allowed: float) -> str:
    """Why an engine is left out that computes something else."""
    return f"its output differs from PyTorch's by {deviation:.1e} (allowed {allowed:.0e}), so its time means nothing"


def measure_disagree(engine: str, what: str, deviation: float, allowed: float) -> str:
    """Why nothing was timed: our engine is wrong."""
    return (
        f"{engine} on {what} differs from eager PyTorch by {deviation:.1e} (allowed {allowed:.0e}); nothing was timed, "
        "please report this with the output of `dynaconv doctor`"
    )
