"""ONNX Runtime and OpenVINO as dense rivals; both read the ONNX file of the network."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.integrations.openvino import openvino_core
from dynaconv.measure.rivals.subject import BATCH, Subject

EXTRA = "engines"
_EXPORT = ("onnx", "onnxscript")


def _missing(package: str) -> str | None:
    absent = [name for name in (package, *_EXPORT) if find_spec(name) is None]
    return _checks.measure_not_installed(absent, EXTRA) if absent else None


def no_onnxruntime() -> str | None:
    """Why ONNX Runtime cannot run, or None."""
    return _missing("onnxruntime")


def no_openvino() -> str | None:
    """Why OpenVINO cannot run, or None."""
    return _missing("openvino")


def no_openvino_bfloat16() -> str | None:
    """Why OpenVINO's default precision is no rival of its own, or None."""
    reason = no_openvino()
    if reason:
        return reason
    able = "BF16" in openvino_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return None if able else _checks.measure_no_bfloat16()


def onnxruntime(subject: Subject, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """ONNX Runtime's CPU provider, every graph optimisation on, the batch fixed before it plans."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3
    options.add_free_dimension_override_by_name(BATCH, x.shape[0])
    file = str(subject.onnx_file(x))
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.contiguous().numpy()}

    def run() -> Tensor:
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def openvino_float32(subject: Subject, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """OpenVINO's CPU plugin, told to compute in float32."""
    return _openvino(subject, x, threads, {"INFERENCE_PRECISION_HINT": "f32"})


def openvino_default(subject: Subject, x: Tensor, threads: int) -> Callable[[], Tensor]:
    """OpenVINO's CPU plugin as it comes: bfloat16 where the processor has it."""
    return _openvino(subject, x, threads, {})


def _openvino(subject: Subject, x: Tensor, threads: int, extra: dict[str, str]) -> Callable[[], Tensor]:
    core = openvino_core()
    graph = core.read_model(str(subject.onnx_file(x)))
    graph.reshape({0: list(x.shape)})
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", **extra}
    request = core.compile_model(graph, "CPU", settings).create_infer_request()
    inputs = [x.contiguous().numpy()]

    def run() -> Tensor:
        # Shared memory on both sides: the numbers are those of the engine, without copies of ours.
        return torch.from_numpy(request.infer(inputs, share_inputs=True, share_outputs=True)[0])

    return run
