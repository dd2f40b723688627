"""Everything that can run a network, timed in one process: dense engines, and a dynamic network with ours and in eager.

Whatever is timed was compared with eager PyTorch before. A rival that computes something else is left out; when our
own engine does, nothing is timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.cost import compare_latency, prepare_for_timing
from dynaconv.cost.profile import profile
from dynaconv.measure.rivals import RIVALS, DenseRivals, deviation

EAGER = "eager"
OURS = {"float32": "dynaconv", "bfloat16": "dynaconv-bf16"}
TITLES = {
    **{rival.name: rival.title for rival in RIVALS.values()},
    "dynaconv": "dynaconv",
    "dynaconv-bf16": "dynaconv bf16",
}
# Where gates decide, a logit at the threshold may fall to the other side in another order of summation.
FORCED, DECIDED = {"float32": 1e-3, "bfloat16": 2e-1}, {"float32": 3e-2, "bfloat16": 5e-1}
# ONNX Runtime's threads wait spinning for some 50 ms after a run, on cores that the next engine needs.
SPINNING, SETTLE_SECONDS = frozenset({"onnxruntime"}), 0.08
Times = dict[str, Any]
Call = Callable[[], Any]


class EnginesDisagree(RuntimeError):
    """Our engine computes something else than eager PyTorch, so nothing was timed."""


@dataclass(frozen=True)
class Runner:
    """A dynamic network in the race. density: of masks that are forced on it, None where its gates decide."""

    label: str
    model: nn.Module
    density: float | None = None


@dataclass
class Race:
    """Milliseconds of one batch, {"min_ms", "median_ms", "runs"}, by engine; of dynamic networks by label and engine.

    macs_ratio: label -> executed multiply-adds of the whole network, gates included, over those of the static one.
    conditional_ratio: label -> executed share of what masks can skip.
    left_out: engine -> why it was not timed. deviations: of our engine from eager PyTorch. compiled: our compiled
    networks, "static" and by label, for each precision.
    """

    dense: dict[str, Times] = field(default_factory=dict)
    dynamic: dict[str, dict[str, Times]] = field(default_factory=dict)
    macs_ratio: dict[str, float] = field(default_factory=dict)
    conditional_ratio: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    deviations: dict[str, float] = field(default_factory=dict)
    compiled: dict[tuple[str, str], Any] = field(default_factory=dict)

    def fastest(self, precision: str = "float32", ours: bool = True, by: str = "min_ms") -> str:
        """The dense engine of this precision with the least minimum (or `by="median_ms"`); `ours` counts our engine.

        Where none of this precision ran, the fastest of all others.
        """
        names = [name for name in self.dense if ours or name not in OURS.values()]
        same = [name for name in names if precision_of(name) == precision]
        return min(same or names, key=lambda name: self.dense[name][by])


def precision_of(engine: str) -> str:
    """float32 or bfloat16."""
    if engine in RIVALS:
        return RIVALS[engine].precision
    return next(precision for precision, name in OURS.items() if name == engine)


def race(
    dense: nn.Module,
    runners: Sequence[Runner],
    batches: Tensor | Sequence[Tensor],
    *,
    rivals: Sequence[str] | None = None,
    precisions: Sequence[str] = ("float32",),
    threads: int | None = None,
    rounds: int = 25,
    seconds: float | None = None,
    executor: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Race:
    """Time a static network with every dense engine, and dynamic ones with our engine and in eager, interleaved.

    Args:
        dense: the static network. runners: dynamic networks on the same pictures.
        batches: one batch [N, C, H, W] or several of equal size; static networks see the first only.
        rivals: names of `dynaconv.measure.rivals.RIVALS`; None takes all that start quickly.
        precisions: that our engine computes in.
        threads: for every engine. rounds, seconds: see `compare_latency`.
        executor: time dynamic networks in eager PyTorch as well.
        progress: called with one line before everything that takes a while.
    Raises:
        EnginesDisagree: our engine does not compute what eager PyTorch computes.
    """
    batches = [batches] if isinstance(batches, Tensor) else list(batches)
    tell = progress or (lambda _line: None)
    calls: dict[tuple[str | None, str], Call] = {}
    result = Race()
    with ExitStack() as stack, torch_threads(threads):
        with DenseRivals(dense, names=rivals, progress=progress) as others:
            calls |= {(None, name): run for name, run in others.prepare(batches[0]).items()}
            expected = eager_outputs(others.subject.model, [channels_last(batches[0])])
        result.left_out |= others.left_out
        tell("compiling with dynaconv")
        for precision in precisions:
            static = Runner("static", dense)
            _add_ours(result, calls, None, static, precision, batches[:1], expected, stack)
        for runner in runners:
            _add_dynamic(result, calls, runner, precisions, batches, stack)
        if not executor:
            calls = {
                (label, name): run for (label, name), run in calls.items() if label is None or name != EAGER
            }
        tell("timing")
        times = compare_latency(
            {f"{label}/{name}": run for (label, name), run in calls.items()},
            rounds=rounds,
            seconds=seconds,
            settle_seconds=SETTLE_SECONDS if SPINNING & {name for _, name in calls} else 0.0,
        )
    for label, name in calls:
        measured = times[f"{label}/{name}"]
        place = result.dense if label is None else result.dynamic.setdefault(label, {})
        place[name] = _per_batch(measured, 1 if label is None else len(batches))
    return result


def _per_batch(times: Times, count: int) -> Times:
    return {
        "min_ms": times["min_ms"] / count,
        "median_ms": times["median_ms"] / count,
        "runs": times["runs"] * count,
    }


def _add_dynamic(
    result: Race,
    calls: dict[tuple[str | None, str], Call],
    runner: Runner,
    precisions: Sequence[str],
    batches: Sequence[Tensor],
    stack: ExitStack,
) -> None:
    """The eager executor and our engine on one dynamic network, and its multiply-adds."""
    model = prepare_for_timing(runner.model)
    stack.enter_context(forced(model, runner.density))
    ready = [channels_last(x) for x in batches]
    expected = eager_outputs(model, ready)
    calls[runner.label, EAGER] = lambda: eager_outputs(model, ready)
    with forced(runner.model, runner.density):
        counted = [profile(runner.model, x, include_linear=True) for x in batches]
    result.macs_ratio[runner.label] = sum(c.macs_ratio for c in counted) / len(counted)
    result.conditional_ratio[runner.label] = sum(c.conditional_ratio for c in counted) / len(counted)
    for precision in precisions:
        _add_ours(result, calls, runner.label, runner, precision, batches, expected, stack)


def _add_ours(
    result: Race,
    calls: dict[tuple[str | None, str], Call],
    label: str | None,
    runner: Runner,
    precision: str,
    batches: Sequence[Tensor],
    expected: Sequence[Tensor],
    stack: ExitStack,
) -> None:
    """Compile, compare with eager, and enter the race; a network or machine that it cannot serve is left out."""
    name = OURS[precision]
    if name in result.left_out:
        return
    try:
        fast = compile_for(runner.model, batches[0], precision)
    except (ValueError, RuntimeError) as error:
        result.left_out[name] = str(error)
        return
    stack.enter_context(forced(fast, runner.density))
    exact = runner.density is not None or not gates(runner.model)
    allowed = (FORCED if exact else DECIDED)[precision]
    worst = max(deviation(fast(x), y) for x, y in zip(batches, expected, strict=True))
    if not worst <= allowed:
        raise EnginesDisagree(_checks.measure_disagree(TITLES[name], runner.label, worst, allowed))
    result.deviations[f"{runner.label}/{name}"] = worst
    result.compiled[runner.label, precision] = fast
    calls[label, name] = lambda: [fast(x) for x in batches]


def compile_for(model: nn.Module, x: Tensor, precision: str) -> Any:
    """`dynaconv.compile` for batches like x, with the compiled kernels.

    Raises:
        ValueError, RuntimeError: the network, the precision or the kernels are not to be had; with the reason.
    """
    import dynaconv

    dtype = None if precision == "float32" else getattr(torch, precision)
    return dynaconv.compile(model, (x,), dtype=dtype, backend="cpu")


@torch.inference_mode()
def eager_outputs(model: nn.Module, batches: Sequence[Tensor]) -> list[Tensor]:
    """The network on each batch."""
    return [model(x) for x in batches]


def channels_last(x: Tensor) -> Tensor:
    """The layout that eager PyTorch is fastest with; other engines get planes, as a user's tensors come."""
    return x.contiguous(memory_format=torch.channels_last)


def forced(model: Any, density: float | None) -> contextlib.AbstractContextManager:
    """`force_masks` where there is a density to force."""
    from dynaconv.testing import force_masks

    return contextlib.nullcontext() if density is None else force_masks(model, density)


@contextlib.contextmanager
def torch_threads(count: int | None) -> Iterator[None]:
    """torch's number of threads inside the `with` block; None leaves it."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
