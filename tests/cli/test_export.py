"""`dynaconv export` and `dynaconv bench --engines ort`: files, facts beside them, and bad input."""

from __future__ import annotations

import json

import pytest
import torch

import dynaconv as dc

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=3)
    dc.dynamize_(model, dc.SpatialMasking())
    facts = {"classes": ["a", "b", "c"], "mean": [0.5] * 3, "std": [0.2] * 3, "image_size": 32}
    return dc.save(model.eval(), tmp_path_factory.mktemp("run") / "model", metadata=facts)


def test_onnx_and_bench(cli, saved, tmp_path) -> None:
    file = tmp_path / "m.onnx"
    answer = cli("export", str(saved), "--out", str(file), "--lowering", "sparse", "--check", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["error"] < 1e-4 and set(answer.json["blocks"].values()) == {"sparse"}
    facts = json.loads((tmp_path / "m.json").read_text())
    assert facts == dc.export.read_metadata(file) and facts["classes"] == ["a", "b", "c"]
    answer = cli("bench", str(file), "--engines", "ort", "--rounds", "1", "--json")
    assert answer.code == 0, answer.err
    assert answer.json["rows"][0]["engine"] == "ort" and answer.json["rows"][0]["latency"]["1"]["min_ms"] > 0
    cli("bench", str(file), "--engines", "dynaconv").complains("does not run an ONNX file")
    (tmp_path / "other.onnx").write_bytes(b"text")
    cli("bench", str(tmp_path / "other.onnx"), "--engines", "ort").complains("was not written by dynaconv")


def test_a_program(cli, saved, tmp_path) -> None:
    answer = cli(
        "export", str(saved), "--format", "pt2", "--out", str(tmp_path / "m.pt2"), "--check", "--json"
    )
    assert answer.code == 0, answer.err
    assert answer.json["error"] < 1e-4
    assert torch.export.load(tmp_path / "m.pt2").module()(torch.randn(2, 3, 32, 32)).shape == (2, 3)


def test_bad_words(cli, saved, tmp_path) -> None:
    cli("export", str(saved), "--opset", "9", "--out", str(tmp_path / "m.onnx")).complains(
        "opset 9 is too old"
    )
    cli("export", str(saved), "--target", "0.5").complains("not calibrated")
    cli("export", str(saved), "--out", str(tmp_path)).complains("is a folder; name a file")
    cli("export", "nothing_like_it").complains("model")
