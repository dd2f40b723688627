"""Stock runtimes on the CPU, each behind one function: from an ONNX file to a callable on numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from dynaconv import _checks
from dynaconv.integrations.openvino import openvino_core

Run = Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
RUNTIMES = {"ort": "onnxruntime", "openvino": "openvino"}
EXTRAS = {"ort": "export", "openvino": "engines"}


def need_runtime(name: str) -> None:
    """Raise ImportError, naming the extra, unless a runtime is installed."""
    if find_spec(RUNTIMES[name]) is None:
        raise _checks.export_not_installed([RUNTIMES[name]], EXTRAS[name])


def onnxruntime_session(
    source: bytes | str | Path, threads: int | None = None, batch: int | None = None
) -> Any:
    """A session of ONNX Runtime's CPU provider with all graph optimisations.

    Raises:
        ImportError: onnxruntime is not installed.
    """
    need_runtime("ort")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    if batch is not None:
        options.add_free_dimension_override_by_name("batch", batch)
    source = source if isinstance(source, bytes) else str(source)
    return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def load(name: str, path: str | Path, threads: int | None = None, batch: int | None = None) -> Run:
    """A network ready to run: {"images": x, ...} -> {"output": y, ...}.

    Args:
        name: "ort" (ONNX Runtime) or "openvino", in float32.
        batch: the number of images, where the file leaves it free.
    Raises:
        ValueError: an unknown runtime. ImportError: it is not installed; the message names the extra.
    """
    _checks.one_of("runtime", name, tuple(RUNTIMES))
    need_runtime(name)
    return (_onnxruntime if name == "ort" else _openvino)(path, threads, batch)


def _onnxruntime(path: str | Path, threads: int | None, batch: int | None) -> Run:
    session = onnxruntime_session(path, threads, batch)
    names = [value.name for value in session.get_outputs()]

    def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return dict(zip(names, session.run(None, dict(feed)), strict=True))

    return run


def _openvino(path: str | Path, threads: int | None, batch: int | None) -> Run:
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
    model = openvino_core().read_model(str(path))
    if batch is not None:
        shapes = {port: port.partial_shape for port in model.inputs}
        for shape in shapes.values():
            if len(shape) > 1 and shape[0].is_dynamic:
                shape[0] = batch
        model.reshape(shapes)
    compiled = openvino_core().compile_model(model, "CPU", settings)
    request, names = compiled.create_infer_request(), [port.any_name for port in compiled.outputs]

    def run(feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        result = request.infer(dict(feed), share_inputs=True)
        return {name: np.array(result[i]) for i, name in enumerate(names)}

    return run
