"""`make bench`, on a toy."""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import dynaconv as dc
from dynaconv.engine import runtime
from dynaconv.measure import race

SCRIPTS = Path(__file__).parents[2] / "benchmarks"
TOY = "--networks resnet8_cifar --input-size 3 32 32 --engines eager --precision float32 --rounds 1".split()
compiled = pytest.mark.skipif(runtime.missing() is not None, reason=str(runtime.missing()))


@pytest.fixture
def bench(monkeypatch, capsys):
    """bench("--linear", ...) -> (exit code, stdout)."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    timed = race.compare_latency
    monkeypatch.setattr(race, "compare_latency", lambda f, **o: timed(f, **{**o, "min_round_ms": 0.01}))
    script = importlib.import_module("engine")

    def run(*words: str) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["engine.py", *TOY, *words])
        return script.main(), capsys.readouterr().out

    return run


@compiled
def test_tables_and_numbers(bench, tmp_path) -> None:
    file = tmp_path / "rows.json"
    code, out = bench("--batch", "1", "2", "--densities", "1", "0.5", "--json", str(file))
    assert code == 0
    assert "| static network | PyTorch eager | dynaconv |" in out and "torch" in out.splitlines()[0]
    rows = json.loads(file.read_text())["rows"]
    assert [(row["batch"], row["masks"]) for row in rows] == [
        (batch, masks) for batch in (1, 2) for masks in ("static", "density 1", "density 0.5")
    ]
    for row in rows:
        assert row["ratio_min"] == row["ours"]["min_ms"] / row["dense"]["eager"]["min_ms"]
        assert row["deviation"] < 1e-3 and row["rival"] == "eager"
    assert rows[0]["macs_ratio"] == 1 < rows[1]["macs_ratio"] and rows[2]["macs_ratio"] < 0.75


@compiled
def test_a_missed_limit_fails_the_check(bench, monkeypatch) -> None:
    script = importlib.import_module("engine")
    # Eager PyTorch alone is not what the promises are about.
    assert bench("--batch", "1", "--check", "--densities", "1")[0] == 1
    for allowed, code in ((1e-6, 1), (1e6, 0)):
        monkeypatch.setattr(script, "limit", lambda *_, allowed=allowed: allowed)
        found, out = bench("--batch", "1", "--check", "--densities", "1")
        assert found == code and ("missed: resnet8_cifar, batch 1, float32, static" in out) == (code == 1)


def test_no_number_while_the_engine_is_wrong(bench, monkeypatch) -> None:
    monkeypatch.setattr(dc, "compile", lambda *_a, **_o: lambda x: x.new_zeros(len(x), 10))
    with pytest.raises(SystemExit, match="nothing was timed"):
        bench("--batch", "1", "--densities", "1")


@compiled
def test_linear(bench) -> None:
    code, out = bench("--batch", "1", "--linear")
    assert code == 0 and "R² = " in out and "with every mask empty" in out
    assert len([line for line in out.splitlines() if line.startswith("| ")]) == 2 + 10


@compiled
@pytest.mark.parametrize("density", ["1", "0.5"])
def test_roofline(bench, density) -> None:
    code, out = bench("--batch", "1", "--roofline", "--densities", density)
    assert code == 0 and "peaks: float32" in out and "| all |" in out
    assert ("density 0.5" in out) == (density == "0.5")


def test_fit_and_limits(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    found = importlib.import_module("linear").fit(np.array([1.0, 2.0, 4.0]), np.array([1.5, 2.0, 3.0]))
    assert found["ms_per_gmac"] == pytest.approx(0.5) and found["intercept_ms"] == pytest.approx(1.0)
    allowed = importlib.import_module("limits").limit
    both = ("eager", "onnxruntime", "openvino-f32")
    limit = partial(allowed, timed=both)
    assert limit("timm:mobilenetv2_100", 8, "float32", "density 0.25", 0.65) == pytest.approx(
        0.8 * 1.25 * 0.65
    )
    assert limit("dyconv4_resnet18", 8, "float32", "dynamic kernels", 1.1) == 1.2
    assert limit("dyconv4_resnet18", 8, "float32", "static", 1.0) is None
    assert limit("timm:resnet50", 1, "float32", "density 0.3", 0.4) is None
    limit = partial(allowed, timed=("openvino",))
    assert limit("timm:resnet50", 1, "bfloat16", "density 0.5", 0.6) == pytest.approx(1.12 * 0.6)
    assert limit("timm:resnet50", 1, "bfloat16", "static", 1.0) == 1.03
    assert limit("timm:resnet50", 1, "float32", "static", 1.0) is None
