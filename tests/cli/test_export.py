"""`dynaconv export` and `dynaconv bench --engines ort`: files, facts beside them, and bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import dynaconv as dc

EXAMPLE = Path(__file__).parents[2] / "examples" / "classify.py"
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
    _classify(file, saved, tmp_path)
    (tmp_path / "other.onnx").write_bytes(b"text")
    cli("bench", str(tmp_path / "other.onnx"), "--engines", "ort").complains("was not written by dynaconv")


def _classify(file, saved, tmp_path) -> None:
    """The example program, to which torch and dynaconv are out of reach, answers as the network does."""
    image = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    names = [str(tmp_path / f"{i}.png") for i in range(len(pixels))]
    for name, picture in zip(names, pixels, strict=True):
        image.fromarray(picture).save(name)
    code = (
        "import runpy, sys; sys.modules['torch'] = sys.modules['dynaconv'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(EXAMPLE), str(file), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    with torch.no_grad():
        x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.2
        expected = dc.load(saved).eval()(x).softmax(1)
    assert [a["class"] for a in answers] == ["abc"[i] for i in expected.argmax(1)]
    np.testing.assert_allclose([a["probability"] for a in answers], expected.amax(1), rtol=1e-4)
    assert all(0 <= a["density"] <= 1 for a in answers)


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
