"""Measuring the strategies of dynamic convolutions against each other, the static convolution and timm's layer."""

from __future__ import annotations

import json
import statistics
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer

from dynaconv._files import atomic_write_text
from dynaconv.cost import machine_line
from dynaconv.nn import CondConv2d
from dynaconv.ops.dynamic_conv2d import EXECUTIONS, choose_execution
from dynaconv.ops.dynamic_conv2d.choice import TABLE, cannot_run

LAYOUTS = {False: torch.contiguous_format, True: torch.channels_last}
TOLERANCE = 1e-5
# Always timed in full; of the others, what takes this many times as long as the fastest in the first round is dropped.
ALWAYS = ("static", "timm", "auto")
HOPELESS = 2.5
MIN_ROUND_S = 0.005


@dataclass(frozen=True)
class KernelShape:
    """One convolution: channels, kernel, size of the square output, groups."""

    label: str
    in_channels: int
    out_channels: int
    kernel: int
    size: int
    groups: int = 1

    @property
    def kind(self) -> str:
        """pointwise, depthwise or spatial."""
        return "depthwise" if self.groups > 1 else "pointwise" if self.kernel == 1 else "spatial"

    @property
    def weights(self) -> int:
        """P, the weights of one kernel."""
        return self.out_channels * self.in_channels // self.groups * self.kernel**2


SHAPES = (
    KernelShape("3x3, 64 channels, 56²", 64, 64, 3, 56),
    KernelShape("3x3, 128 channels, 28²", 128, 128, 3, 28),
    KernelShape("3x3, 256 channels, 14²", 256, 256, 3, 14),
    KernelShape("3x3, 512 channels, 7²", 512, 512, 3, 7),
    KernelShape("1x1, 24 to 144, 56²", 24, 144, 1, 56),
    KernelShape("1x1, 96 to 24, 56²", 96, 24, 1, 56),
    KernelShape("1x1, 64 to 384, 14²", 64, 384, 1, 14),
    KernelShape("1x1, 160 to 960, 7²", 160, 960, 1, 7),
    KernelShape("1x1, 960 to 160, 7²", 960, 160, 1, 7),
    KernelShape("depthwise 3x3, 144 channels, 56²", 144, 144, 3, 56, 144),
    KernelShape("depthwise 3x3, 576 channels, 14²", 576, 576, 3, 14, 576),
    KernelShape("depthwise 3x3, 960 channels, 7²", 960, 960, 3, 7, 960),
)


@dataclass
class KernelTiming:
    """Milliseconds (minimum and median) and peak memory of everything that can run one shape.

    chosen: what `auto` runs.
    entries: "static", "timm", "auto", "compiled" and the strategies -> {"min_ms", "median_ms", "peak_mib"}.
    """

    shape: KernelShape
    batch: int
    training: bool
    channels_last: bool
    chosen: str = ""
    entries: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def strategies(self) -> dict[str, float]:
        """Milliseconds of what `auto` can choose from."""
        return {n: e["min_ms"] for n, e in self.entries.items() if n in (*EXECUTIONS[1:], "compiled")}

    @property
    def fastest(self) -> str:
        """The fastest of them."""
        return min(self.strategies, key=self.strategies.__getitem__)

    def over(self, name: str) -> float | None:
        """How many times faster `auto` is than `name`."""
        return self.entries[name]["min_ms"] / self.entries["auto"]["min_ms"] if name in self.entries else None

    def to_row(self) -> dict[str, Any]:
        """The row of the table that `auto` looks shapes up in."""
        torch_only = {n: ms for n, ms in self.strategies.items() if n != "compiled"}
        return {
            "kind": self.shape.kind,
            "training": self.training,
            "channels_last": self.channels_last,
            "batch": self.batch,
            "out_channels": self.shape.out_channels,
            "weights": self.shape.weights,
            "positions": self.shape.size**2,
            "execution": min(torch_only, key=torch_only.__getitem__),
            "compiled": self.fastest == "compiled",
        }


def measure_kernels(
    shapes: Sequence[KernelShape] = SHAPES,
    batches: Sequence[int] = (1, 8, 32),
    *,
    num_experts: int = 4,
    rounds: int = 7,
    layouts: Sequence[bool] = (False, True),
    training: Sequence[bool] = (False, True),
    progress: Callable[[], None] | None = None,
) -> Iterator[KernelTiming]:
    """Time every strategy, `auto`, the static convolution and timm's CondConv2d, interleaved, shape by shape.

    Values are checked against the `grouped` strategy before anything is timed; routing is given, so that only the
    convolution is timed. A training step is forward and backward to input, experts and routing.

    Raises:
        RuntimeError: a strategy computes something else (no time is reported then).
    """
    for mode in training:
        for layout in layouts:
            for shape in shapes:
                for batch in batches:
                    yield _measure(shape, batch, mode, layout, num_experts, rounds)
                    if progress is not None:
                        progress()


def _measure(shape, batch: int, training: bool, layout: bool, experts: int, rounds: int) -> KernelTiming:
    torch.manual_seed(0)
    timing = KernelTiming(shape, batch, training, layout)
    x = torch.randn(batch, shape.in_channels, shape.size, shape.size).contiguous(
        memory_format=LAYOUTS[layout]
    )
    routing = torch.rand(batch, experts)
    calls = dict(_calls(timing, x, routing, experts))
    expected = calls["grouped"]()
    for name, call in calls.items():
        got = call()
        # The first call also warms up whatever is allocated or packed once.
        if name != "static" and (got - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise RuntimeError(
                f"{name} disagrees with grouped on {shape.label} at batch {batch}; nothing was timed"
            )
    steps = {name: _step(call, (x, routing), training) for name, call in calls.items()}
    timing.chosen = _chosen(timing, experts, "compiled" in calls)
    for name, times in _interleaved(steps, rounds).items():
        # Under the mode that counts bytes auto stays off the compiled kernel, so what it would choose is measured.
        peak = _peak_mib(steps.get(timing.chosen, steps[name]) if name == "auto" else steps[name])
        ms = [t * 1e3 for t in times]
        timing.entries[name] = {"min_ms": min(ms), "median_ms": statistics.median(ms), "peak_mib": peak}
    return timing


def _chosen(timing: KernelTiming, experts: int, compiled: bool) -> str:
    """What `auto` runs."""
    shape = timing.shape
    return choose_execution(
        "auto",
        batch=timing.batch,
        weight_shape=(shape.out_channels, shape.in_channels // shape.groups, shape.kernel, shape.kernel),
        positions=shape.size**2,
        groups=shape.groups,
        experts=experts,
        training=timing.training,
        channels_last=timing.channels_last,
        compiled=compiled,
    )


def _interleaved(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, round by round; what is far behind in the first round is timed no further."""
    timers = {
        name: Timer("f()", globals={"f": f}, num_threads=torch.get_num_threads()) for name, f in steps.items()
    }
    times = {name: [timer.timeit(1).mean] for name, timer in timers.items()}
    fastest = min(ts[0] for name, ts in times.items() if name not in ("static", "timm"))
    running = [n for n, ts in times.items() if n in ALWAYS or ts[0] < HOPELESS * fastest]
    repeats = {name: max(1, round(MIN_ROUND_S / times[name][0])) for name in running}
    for _ in range(rounds):
        for name in running:
            times[name].append(timers[name].timeit(repeats[name]).mean)
    return times


def _calls(timing: KernelTiming, x: Tensor, routing: Tensor, experts: int) -> Iterator[tuple[str, Callable]]:
    shape, batch = timing.shape, timing.batch
    made = (shape.in_channels, shape.out_channels, shape.kernel)
    options = {"padding": shape.kernel // 2, "groups": shape.groups, "bias": False}
    layer = CondConv2d(*made, **options, num_experts=experts).train(timing.training)
    conv = nn.Conv2d(*made, **options).to(memory_format=LAYOUTS[timing.channels_last])
    yield "static", lambda: conv(x)
    facts = {"batch": batch, "kernel": (shape.kernel,) * 2, "experts": experts, "taps": False}
    slow = set()
    if shape.kind == "depthwise" or batch > 8:
        # K times the multiply-adds; ten times behind at the smaller batches already.
        slow.add("feature")
    if shape.kind == "depthwise" or (shape.kernel > 1 and shape.size > 28 and batch > 1):
        slow.add("unfold")
    for execution in EXECUTIONS[1:]:
        if cannot_run(execution, **facts) is None and execution not in slow:
            yield execution, _with(layer, execution, x, routing)
    from dynaconv.ops.dynamic_conv2d import compiled

    if not timing.training and compiled.cannot_run(x, layer.weight, shape.groups) is None:
        panels, geometry = layer.packed.panels(layer.weight), layer.geometry(layer.padding)
        given = x, layer.weight, routing, None, None, None, geometry, panels
        yield "compiled", lambda: compiled.dynamic_conv(*given)
    yield "auto", _with(layer, "auto", x, routing)
    rival = _timm(made, options, experts, layer)
    if rival is not None:
        yield "timm", lambda: rival(x, routing)


def _with(layer: CondConv2d, execution: str, x: Tensor, routing: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        layer.execution = execution
        return layer(x, routing)

    return run


def _timm(made: tuple, options: dict, experts: int, layer: CondConv2d) -> nn.Module | None:
    """timm's layer with the same experts, where timm is installed."""
    from dynaconv.integrations.timm import import_timm

    try:
        import_timm()
    except ImportError:
        return None
    from timm.layers import CondConv2d as TimmCondConv2d

    rival = TimmCondConv2d(*made, **options, num_experts=experts)
    rival.weight.data.copy_(layer.weight.data.flatten(1))
    return rival


def _step(call: Callable[[], Tensor], inputs: Sequence[Tensor], training: bool) -> Callable[[], None]:
    def forward() -> None:
        with torch.no_grad():
            call()

    def forward_and_backward() -> None:
        for t in inputs:
            t.requires_grad_(True).grad = None
        y = call()
        y.backward(torch.ones_like(y))

    return forward_and_backward if training else forward


class _LiveBytes(TorchDispatchMode):
    """Bytes of tensors that operations made and that are still alive, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(t, Tensor):
                self._add(t.untyped_storage())
        return out

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or size == 0:
            return
        self._seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.live -= size


def _peak_mib(step: Callable[[], None]) -> float:
    """Peak of the tensors that one step makes, in MiB; workspaces inside libraries are not seen."""
    with _LiveBytes() as mode:
        step()
    return mode.peak / 2**20


def write_table(timings: Sequence[KernelTiming], path: Path = TABLE) -> Path:
    """Write the table that `auto` reads, whole or not at all."""
    rows = [json.dumps(t.to_row()) for t in timings]
    text = ",\n  ".join(rows)
    atomic_write_text(path, f'{{"machine": {json.dumps(machine_line())}, "rows": [\n  {text}\n]}}\n')
    return path


def to_dict(timing: KernelTiming) -> dict[str, Any]:
    """JSON-ready form."""
    return {
        **asdict(timing),
        "fastest": timing.fastest,
        "auto_over_timm": timing.over("timm"),
        "auto_over_static": timing.over("static"),
    }
