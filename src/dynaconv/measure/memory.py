"""Peak memory of each engine on one network, in a fresh process: what loading it and running it adds.

Linux only: the kernel keeps the highest resident size (VmHWM) and lets a process reset it.
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.measure.rivals import runtimes
from dynaconv.measure.rivals.subject import Subject

ENGINES = ("dynaconv", "eager", "onnxruntime", "openvino-f32", "openvino")
RUNS = 3


def peak_memory(
    model: nn.Module,
    x: Tensor,
    *,
    threads: int | None = None,
    names: Sequence[str] = ENGINES,
    compiled: object | None = None,
) -> dict[str, float | str]:
    """Megabytes that each engine needs at most, above an interpreter with its libraries loaded; or why not.

    Weights, prepared copies of them and all buffers count; three forward passes on noise of x's shape.

    Args:
        model: a static network. x: [N, C, H, W].
        compiled: our compiled network, for "dynaconv"; without it that name is left out.
    """
    threads = threads or torch.get_num_threads()
    subject, found = Subject(model), {}
    try:
        with tempfile.TemporaryDirectory(prefix="dynaconv-") as folder:
            for name in names:
                if name == "dynaconv" and compiled is None:
                    continue
                try:
                    file = _write(name, subject, compiled, x, Path(folder))
                    found[name] = _ask(name, file, tuple(x.shape), threads)
                except Exception as error:  # noqa: BLE001 - one engine's trouble must not hide the others' numbers
                    found[name] = _checks.measure_failed(error)
    finally:
        subject.close()
    return found


def _write(name: str, subject: Subject, compiled: object | None, x: Tensor, folder: Path) -> Path:
    """The network as the engine reads it in its own process."""
    if name == "dynaconv":
        compiled.save(folder / "compiled")
        return folder / "compiled"
    if name == "eager":
        torch.save(subject.model, folder / "model.pt")
        return folder / "model.pt"
    reason = runtimes.no_onnxruntime() if name == "onnxruntime" else runtimes.no_openvino()
    if reason:
        raise RuntimeError(reason)
    return subject.onnx_file(x)


def _ask(name: str, file: Path, shape: tuple[int, ...], threads: int) -> float:
    words = [
        sys.executable,
        "-m",
        "dynaconv.measure.memory",
        name,
        str(file),
        json.dumps(shape),
        str(threads),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(
            done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "its process died"
        )
    return float(done.stdout.strip().splitlines()[-1])


def resident_mb(field: str) -> float:
    """VmRSS (resident now) or VmHWM (at most) of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def reset_peak() -> float:
    """Give back what is free, forget the highest resident size, and return the present one, MB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return resident_mb("VmRSS")


class _File(Subject):
    """A network that is an ONNX file already."""

    def __init__(self, file: Path) -> None:
        self._file, self._folder = file, None


def _loader(name: str, file: Path, x: Tensor, threads: int) -> Callable[[], Callable[[], object]]:
    """Import what the engine needs; the returned function loads the network and returns how to run it."""
    if name == "dynaconv":
        import dynaconv.engine as engine

        return lambda: _bind(engine.load(file), x)
    if name == "eager":
        from dynaconv.integrations import import_timm

        import_timm()
        ready = x.contiguous(memory_format=torch.channels_last)
        return lambda: _bind(torch.load(file, weights_only=False), ready)
    if name == "onnxruntime":
        import onnxruntime  # noqa: F401

        return lambda: runtimes.onnxruntime(_File(file), x, threads)
    import openvino  # noqa: F401

    prepare = runtimes.openvino_float32 if name == "openvino-f32" else runtimes.openvino_default
    return lambda: prepare(_File(file), x, threads)


def _bind(model: Callable[[Tensor], object], x: Tensor) -> Callable[[], object]:
    return lambda: model(x)


def _child(name: str, file: str, shape: str, threads: str) -> float:
    torch.set_num_threads(int(threads))
    x = torch.randn(json.loads(shape))
    with torch.inference_mode():
        # The first parallel region starts the threads, whose stacks belong to nobody's network.
        x.sum()
        load = _loader(name, Path(file), x, int(threads))
        before = reset_peak()
        run = load()
        for _ in range(RUNS):
            run()
    return resident_mb("VmHWM") - before


if __name__ == "__main__":
    print(_child(*sys.argv[1:]))
