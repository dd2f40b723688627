"""Dense rivals: the same numbers as eager PyTorch, or left out with the reason."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from dynaconv.measure import rivals as room
from dynaconv.measure.rivals import RIVALS, DenseRivals, deviation, table


@pytest.fixture
def network(seed) -> nn.Module:
    layers = (nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval()


def outputs(network: nn.Module, name: str, batch: int) -> tuple[torch.Tensor, torch.Tensor, DenseRivals]:
    if reason := RIVALS[name].available():
        pytest.skip(reason)
    x = torch.randn(batch, 3, 16, 16)
    with DenseRivals(network, threads=1, names=[name]) as rivals:
        ready = rivals.prepare(x)
    assert not rivals.left_out
    # The ONNX file is gone by now, and twice is the same.
    first = ready[name]().clone()
    assert torch.equal(first, ready[name]())
    with torch.no_grad():
        return first, network(x), rivals


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "name",
    [
        "eager",
        "inductor",
        pytest.param("onnxruntime", marks=pytest.mark.needs("onnx", "onnxscript", "onnxruntime")),
        pytest.param("openvino-f32", marks=pytest.mark.needs("onnx", "onnxscript", "openvino")),
    ],
)
def test_float32_rivals_agree_with_eager(network, name, batch) -> None:
    got, expected, rivals = outputs(network, name, batch)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert 0 <= rivals.deviations[name] < 1e-4


OVERLAP = """
import gc, signal
import torch
from dynaconv.measure.rivals import DenseRivals
from dynaconv.measure.rivals.runtimes import no_openvino_bfloat16

network, x = torch.nn.Conv2d(3, 8, 3).eval(), torch.randn(1, 3, 8, 8)
runs = []
for _ in range(2):
    no_openvino_bfloat16()
    with DenseRivals(network, threads=1, names=["openvino-f32"]) as rivals:
        runs.append(rivals.prepare(x))
del rivals
while runs:
    del runs[0]
    gc.collect()
try:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


@pytest.mark.needs("onnx", "onnxscript", "openvino")
def test_ctrl_c_arrives_after_networks_in_openvino_went_in_the_order_they_came() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OVERLAP], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "interrupted"), done.stderr


@pytest.mark.needs("onnx", "onnxscript", "openvino")
def test_bfloat16_of_openvino_agrees_roughly_or_is_left_out(network) -> None:
    with DenseRivals(network, threads=1, names=["openvino"]) as rivals:
        ready = rivals.prepare(torch.randn(2, 3, 16, 16))
    if "openvino" in ready:
        assert 0 < rivals.deviations["openvino"] < 0.05
    else:
        assert "no bfloat16" in rivals.left_out["openvino"]


def test_one_export_serves_all_batch_sizes(network, monkeypatch) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    calls = []
    whole = torch.onnx.export
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **o: (calls.append(1), whole(*a, **o)))
    with DenseRivals(network, threads=1, names=["onnxruntime"]) as rivals:
        for batch in (1, 2):
            assert rivals.prepare(torch.randn(batch, 3, 16, 16))["onnxruntime"]().shape == (batch, 5)
        folder = rivals.subject.onnx_file(torch.randn(1, 3, 16, 16)).parent
    assert calls == [1] and not folder.exists()


def broken(error: Exception):
    def prepare(*_):
        raise error

    return prepare


def test_a_rival_that_fails_or_is_wrong_or_missing_is_left_out_with_the_reason(network, monkeypatch) -> None:
    eager = RIVALS["eager"]
    double = replace(eager, prepare=lambda s, x, t: lambda: 2 * s.model(x))
    made_up = {
        "eager": eager,
        "broken": replace(eager, name="broken", prepare=broken(RuntimeError("no such\nkernel"))),
        "wrong": replace(double, name="wrong"),
        "nan": replace(eager, name="nan", prepare=lambda s, x, t: lambda: s.model(x) * float("nan")),
        "absent": replace(eager, name="absent", available=lambda: "needs something"),
    }
    monkeypatch.setattr(table, "RIVALS", made_up)
    told: list[str] = []
    with DenseRivals(network, threads=1, progress=told.append) as rivals:
        assert list(rivals.prepare(torch.randn(1, 3, 16, 16))) == ["eager"]
    assert rivals.left_out["broken"] == "failed: RuntimeError: no such kernel"
    assert "differs from PyTorch's by 1.0e+00" in rivals.left_out["wrong"]
    assert "inf" in rivals.left_out["nan"] and rivals.left_out["absent"] == "needs something"
    assert len(told) == 5


def test_what_is_not_installed_is_named(monkeypatch) -> None:
    from dynaconv.measure.rivals import runtimes

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    reasons = room.rivals_available()
    assert reasons["eager"] is None
    assert reasons["onnxruntime"] == "needs onnxruntime, onnx, onnxscript: pip install 'dynaconv[engines]'"
    assert reasons["openvino"].startswith("needs openvino,")


def test_names() -> None:
    assert room.choose_rivals(None) == [name for name in RIVALS if name != "inductor"]
    assert room.choose_rivals(["onnxruntime", "eager"]) == ["eager", "onnxruntime"]
    with pytest.raises(ValueError, match="unknown engine 'onnx-runtime'; did you mean 'onnxruntime'"):
        room.choose_rivals(["onnx-runtime"])


def test_deviation() -> None:
    x = torch.ones(4)
    assert deviation(x, x) == 0 and deviation(x + 1, x) == 1
    assert deviation(torch.full((4,), float("nan")), x) == float("inf") == deviation(torch.ones(3), x)
