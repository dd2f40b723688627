"""What tests of exported networks share: tracing, the slow part, is done once for equal arguments."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")


@pytest.fixture(scope="session")
def _traces() -> dict[Any, Any]:
    return {}


@pytest.fixture
def trace_once(_traces, monkeypatch):
    """`export.onnx` of the same network object traces it once."""
    from dynaconv.export import api

    real = api.trace

    def trace(model, example, **options):
        key = (id(model), tuple(sorted(options.items())))
        if key not in _traces:
            _traces.clear()
            _traces[key] = real(model, example, **options), model
        traced = copy.copy(_traces[key][0])
        traced.model, traced.names = traced.model.clone(), list(traced.names)
        names = {name: value.name for name, value in traced.thresholds.items()}
        traced.thresholds = {name: traced.graph.initializers[initial] for name, initial in names.items()}
        return traced

    monkeypatch.setattr(api, "trace", trace)


@pytest.fixture
def ort():
    """(path, images, *inputs, **named inputs) -> outputs by name, in ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    from dynaconv.export.runtimes import load

    loaded = {}

    def run(path, *inputs, **named):
        key = path, path.stat().st_mtime_ns
        if key not in loaded:
            loaded[key] = load("ort", path, 1)
        feed = {f"input_{i}" if i else "images": np.asarray(x) for i, x in enumerate(inputs)}
        return loaded[key](feed | {name: np.asarray(v, np.float32) for name, v in named.items()})

    return run
