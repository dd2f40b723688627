from __future__ import annotations

import pytest

FAST = ["--rounds", "1", "--batch", "1", "2"]


def test_network_by_name_gets_forced_masks(cli) -> None:
    data = cli("bench", "dynconv_resnet8_cifar", *FAST, "--json").json
    assert data["masks"] == "forced, density 0.5" and data["pictures"] == "noise"
    assert set(data["batches"]) == {"1", "2"}
    point = data["batches"]["1"]["points"][0]
    assert point["density"] == 0.5 and 0.5 < point["conditional_ratio"] < 0.7
    dense = data["batches"]["1"]["dense"]
    assert point["ratio_min"] == pytest.approx(point["min_ms"] / dense["min_ms"])
    assert dense["min_ms"] == min(times["min_ms"] for times in dense["engines"].values())
    assert "eager" in point["engines"] and point["min_ms"] == point["engines"][point["engine"]]["min_ms"]
    assert max(data["largest_deviation"].values()) < 1e-4
    assert "torch" in data["machine"]


def test_a_static_network_shows_what_masks_would_buy(cli) -> None:
    answer = cli("bench", "resnet8_cifar", "--force-density", "0.75", "0.25", "--rounds", "1")
    assert answer.code == 0, answer.err
    for told in (
        "static",
        "PyTorch eager",
        "density 0.75",
        "density 0.25",
        "eager executor",
        "MACs/dense",
        " *",
    ):
        assert told in answer.out
    assert "masks: forced, density 0.75, 0.25" in answer.out


@pytest.mark.needs("timm")
def test_dynamic_kernels_have_no_masks(cli) -> None:
    words = ("dyconv4_resnet18", "--input-size", "3", "32", "32", "--rounds", "1", "--json")
    batch = cli("bench", *words).json["batches"]["1"]
    assert [point["label"] for point in batch["points"]] == ["dynamic kernels"]
    assert batch["points"][0]["macs_ratio"] > 1


@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
def test_a_dense_rival(cli) -> None:
    words = ("dynconv_resnet8_cifar", "--engines", "onnxruntime", "--batch", "2", "--rounds", "1", "--json")
    engines = cli("bench", *words).json["batches"]["2"]["dense"]["engines"]
    assert {"eager", "onnxruntime"} <= set(engines)


def test_rivals_that_are_not_installed_are_named_in_one_line(cli, monkeypatch) -> None:
    from dynaconv.measure.rivals import runtimes

    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    answer = cli(
        "bench", "dynconv_resnet8_cifar", "--engines", "onnxruntime", "openvino", "openvino-f32", *FAST
    )
    assert answer.code == 0
    line = next(line for line in answer.out.splitlines() if line.startswith("not timed: "))
    assert "ONNX Runtime (needs onnxruntime, onnx, onnxscript: pip install 'dynaconv[engines]')" in line
    assert "OpenVINO f32, OpenVINO bf16 (needs openvino" in line


def test_our_engine_must_agree_with_eager(cli, monkeypatch) -> None:
    import dynaconv as dc

    class Wrong:
        gates = ("layer1.0",)

        def __call__(self, x):
            return x.new_zeros(len(x), 10)

        def force(self, masks):
            return {}

    monkeypatch.setattr(dc, "compile", lambda *_a, **_o: Wrong(), raising=False)
    answer = cli("bench", "dynconv_resnet8_cifar", *FAST)
    assert (answer.code, answer.out) == (1, "")
    assert "dynaconv on static differs from eager PyTorch by 1.0e+00" in answer.err


def test_targets_of_a_saved_network(cli, saved) -> None:
    answer = cli("bench", saved, *FAST, "--threads", "1", "--target", "0.3", "0.7")
    assert answer.code == 0
    for told in ("target 0.3", "target 0.7", "decided by the gates", "median/dense", "1 threads", "noise"):
        assert told in answer.out
    assert "agrees with computing everything" in answer.err


def test_no_times_when_skipping_is_wrong(cli, monkeypatch) -> None:
    monkeypatch.setattr(
        "dynaconv.measure.compare_with_dense", lambda model, x: {"layer1.0": 1e-6, "layer2.0": 0.1}
    )
    answer = cli("bench", "dynconv_resnet8_cifar", *FAST)
    assert (answer.code, answer.out) == (1, "")
    assert "block 'layer2.0'" in answer.err and "nothing was timed" in answer.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet8_cifar"], ["resnet8_cifar is static", "--force-density 0.5", "--dynamize"]),
        (["dynconv_resnet8_cifar", "--target", "0"], ["must lie in (0, 1], got 0"]),
        (["dynconv_resnet8_cifar", "--target", "0.5"], ["not calibrated"]),
        (["dynconv_resnet8_cifar", "--target", "0.5", "--force-density", "0.5"], ["exclude each other"]),
        (["dynconv_resnet8_cifar", "--force-density", "-0.5"], ["density must lie in [0, 1]"]),
        (["dynconv_resnet8_cifar", "--batch", "0"], ["--batch must be at least 1"]),
        (["dynconv_resnet8_cifar", "--rounds", "0"], ["--rounds must be at least 1"]),
        (["dynconv_resnet8_cifar", "--threads", "0"], ["--threads must be at least 1"]),
        (["dynconv_resnet8_cifar", "--engines", "onnx-runtime"], ["unknown engine", "'onnxruntime'"]),
    ],
)
def test_bad_input(cli, words, told) -> None:
    cli("bench", *words).complains(*told)
