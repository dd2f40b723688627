"""All dense rivals behind one interface: which there are, why one cannot run, and the others ready to be timed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.measure.rivals import pytorch, runtimes
from dynaconv.measure.rivals.subject import Subject

Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Rival:
    """A dense engine: its name, how people call it, what it computes in.

    available: None, or one line that says why it cannot run. prepare: (subject, x [N, C, H, W], threads) -> a function
    without arguments that computes the network on x and returns its output.
    package: the distribution that it comes in.
    slow_start: preparing takes a minute, so it runs only where it is asked for.
    """

    name: str
    title: str
    precision: str
    available: Callable[[], str | None]
    prepare: Callable[[Subject, Tensor, int], Run]
    package: str = "torch"
    slow_start: bool = False


RIVALS: dict[str, Rival] = {
    rival.name: rival
    for rival in (
        Rival("eager", "PyTorch eager", "float32", lambda: None, pytorch.eager),
        Rival("inductor", "torch.compile", "float32", pytorch.no_compiler, pytorch.inductor, slow_start=True),
        Rival(
            "onnxruntime", "ONNX Runtime", "float32", runtimes.no_onnxruntime, runtimes.onnxruntime, "onnxruntime"
        ),
        Rival(
            "openvino-f32", "OpenVINO f32", "float32", runtimes.no_openvino, runtimes.openvino_float32, "openvino"
        ),
        Rival(
            "openvino", "OpenVINO bf16", "bfloat16", runtimes.no_openvino_bfloat16, runtimes.openvino_default,
            "openvino",
        ),
    )
}  # fmt: skip
# Largest deviation from eager PyTorch in float32 with which a time still means something.
TOLERANCES = {"float32": 1e-3, "bfloat16": 2e-1}


def deviation(got: Tensor, expected: Tensor) -> float:
    """Root mean square of the error over that of the output, whole batch; NaN or another shape is infinitely far.

    >>> deviation(torch.tensor([1.0, 2.2]), torch.tensor([1.0, 2.0])) < 0.1
    True
    """
    if got.shape != expected.shape:
        return float("inf")
    got, expected = got.detach().double(), expected.detach().double()
    scale = expected.square().mean().sqrt().clamp(min=1e-12)
    return float(((got - expected).square().mean().sqrt() / scale).nan_to_num(nan=float("inf")))


class DenseRivals:
    """The dense engines of this machine on one static network; a context manager, because of its temporary file.

    Args:
        model: static network whose output is one tensor; it is copied.
        threads: for every engine, default torch's current number.
        names: of RIVALS; None takes all that start quickly.
        progress: called with one line before each engine is prepared.

    `left_out` maps the names of those that cannot run to the reason.

    >>> import dynaconv as dc
    >>> x = torch.randn(2, 3, 32, 32)
    >>> with DenseRivals(dc.create_model("resnet8_cifar"), names=["eager"]) as rivals:
    ...     outputs = {name: tuple(run().shape) for name, run in rivals.prepare(x).items()}
    >>> outputs
    {'eager': (2, 10)}
    """

    def __init__(
        self,
        model: nn.Module,
        threads: int | None = None,
        names: Sequence[str] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        self.subject = Subject(model)
        self.threads = threads or torch.get_num_threads()
        self.left_out: dict[str, str] = {}
        self.deviations: dict[str, float] = {}
        self._tell = progress or (lambda _line: None)
        self.names = choose_rivals(names)

    def __enter__(self) -> DenseRivals:
        return self

    def __exit__(self, *_: object) -> None:
        self.subject.close()

    def prepare(self, x: Tensor) -> dict[str, Run]:
        """name -> function that computes the network on x [N, C, H, W], for every rival that runs and is right."""
        with torch.inference_mode():
            expected = self.subject.model(x.contiguous(memory_format=torch.channels_last)).clone()
        ready: dict[str, Run] = {}
        for name in self.names:
            if name in self.left_out:
                continue
            run = self._one(RIVALS[name], x, expected)
            if run is not None:
                ready[name] = run
        return ready

    def _one(self, rival: Rival, x: Tensor, expected: Tensor) -> Run | None:
        self._tell(f"preparing {rival.title}")
        try:
            reason = rival.available()
            if reason is None:
                run = rival.prepare(self.subject, x, self.threads)
                worst = deviation(run(), expected)
        except Exception as error:  # noqa: BLE001 - somebody else's engine may raise anything; it is told, not hidden
            reason = _checks.measure_failed(error)
        else:
            allowed = TOLERANCES[rival.precision]
            if reason is None and worst > allowed:
                reason = _checks.measure_deviates(worst, allowed)
        if reason is not None:
            self.left_out[rival.name] = reason
            return None
        self.deviations[rival.name] = max(worst, self.deviations.get(rival.name, 0.0))
        return run


def choose_rivals(names: Sequence[str] | None) -> list[str]:
    """The names asked for, in the order of RIVALS; None is all that start quickly.

    Raises:
        ValueError: an unknown name.
    """
    if names is None:
        return [name for name, rival in RIVALS.items() if not rival.slow_start]
    for name in names:
        _checks.one_of("engine", name, tuple(RIVALS))
    return [name for name in RIVALS if name in names]


def rivals_available() -> dict[str, str | None]:
    """name -> None, or why it cannot run here."""
    return {name: rival.available() for name, rival in RIVALS.items()}
