from __future__ import annotations

import torch

from dynaconv.cli import doctor
from dynaconv.ops import _native


def test_facts(cli) -> None:
    data = cli("doctor", "--json").json
    assert data["torch"] == torch.__version__
    assert data["self_check"]["passed"] and data["self_check"]["worst_deviation"] < 1e-4
    assert data["free_disk_gb"] > 0 and data["threads"] >= 1
    assert data["engine"].startswith(("compiled kernels, ", "PyTorch operations: "))
    assert data["torch_operators"] == (_native.missing() or "registered, for every torch from 2.11 on")
    assert data["engine_bfloat16"].startswith(("yes", "no: "))
    engines = {e["engine"]: e for e in data["engines"]}
    assert engines["eager"]["problem"] is None and {"onnxruntime", "openvino", "inductor"} <= set(engines)
    assert {p["package"] for p in data["packages"]} >= {"timm", "lightning", "plotly"}


def test_text_and_a_missing_package(cli, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"train": ("nothing_of_that_name",)})
    answer = cli("doctor")
    assert answer.code == 0
    assert "No module named 'nothing_of_that_name'" in answer.out
    assert "self-check passed" in answer.out


def test_exit_code_1_when_skipping_is_wrong(cli, monkeypatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {})
    monkeypatch.setattr("dynaconv.measure.verify.compare_with_dense", lambda model, x: {"layer1.0": 0.1})
    answer = cli("doctor")
    assert answer.code == 1
    assert "self-check FAILED" in answer.out
