from __future__ import annotations

import json

import pytest
import torch

import dynaconv as dc
from dynaconv.cli import main

FAST = [
    "--methods", "static", "--image-size", "32", "--train-size", "64", "--width", "4", "--epochs", "1",
    "--seeds", "1", "--precision", "fp32", "--time-batch", "1", "--rounds", "1", "--quiet",
]  # fmt: skip
DATA = {"mean": [0.5] * 3, "std": [0.5] * 3, "image_size": 32, "dataset": "scenes"}


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """A static network and a dynamic one for scenes, not trained."""
    folder = tmp_path_factory.mktemp("networks")
    torch.manual_seed(0)
    for name, config in (("static", None), ("dynamic", dc.DYConv(init="fresh"))):
        model = dc.create_model("resnet8_cifar", width=4)
        if config is not None:
            dc.dynamize_(model, config)
        dc.save(model, folder / name, metadata={**DATA, "classes": [str(d) for d in range(10)]})
    return folder


@pytest.fixture(scope="module")
def compact(few_scenes, tmp_path_factory):
    out = tmp_path_factory.mktemp("study") / "compact"
    assert main(["study", "compactness", *FAST, "--out", str(out)]) == 0
    return out


def test_which_study(cli) -> None:
    cli("study").complains("which study", "correlation", "attention", "compactness")
    cli("study", "corelation").complains("unknown study 'corelation'", "did you mean 'correlation'")
    cli("study", "compactness", "--sed", "1").complains(
        "unknown option of dynaconv study compactness", "--seeds"
    )
    cli("study", "compactness", "--seeds", "x").complains("--seeds expects a whole number")
    cli("study", "correlation", "one").complains("dynaconv study correlation: missing: dynamic")
    for name in ("correlation", "attention", "compactness", "accuracy-macs"):
        answer = cli("study", name, "--help")
        assert answer.code == 0 and answer.out.startswith(f"usage: dynaconv study {name}")
        assert answer.out.count(f"  dynaconv study {name}") >= 2


def test_correlation(cli, networks, tmp_path) -> None:
    answer = cli(
        "study",
        "correlation",
        networks / "static",
        networks / "dynamic",
        "--images",
        8,
        "--out",
        tmp_path / "c",
    )
    assert answer.code == 0, answer.err
    assert "features  static   layer2" in answer.out and "means over 8 pictures of scenes" in answer.out
    names = {path.name for path in (tmp_path / "c").iterdir()}
    found = {"study.json", "correlation.json", "buckets.csv", "histogram.csv", "correlation.png"}
    assert names - {".lock"} == found
    again = cli(
        "study", "correlation", networks / "static", networks / "dynamic", "--data", "noise", "--images", 4,
        "--layer", "layer3", "--thresholds", 0.6, 0.4, 0.2, "--out", tmp_path / "c", "--json",
    ).json  # fmt: skip
    assert again["layers"] == ["layer3", "layer3"] and again["thresholds"]["strong"] == 0.6
    assert json.loads((tmp_path / "c" / "correlation.json").read_text())["data"] == "noise"


def test_correlation_bad_input(cli, networks, tmp_path) -> None:
    static, dynamic, out = networks / "static", networks / "dynamic", ("--out", tmp_path / "c")
    cli("study", "correlation", static, static, *out).complains("has no dynamic kernels")
    cli("study", "correlation", static, tmp_path / "nothing", *out).complains("there is no folder")
    cli("study", "correlation", "resnet8_cifar", "resnet8_cifr", *out).complains(
        "unknown model", "resnet8_cifar"
    )
    cli("study", "correlation", "resnet8_cifar", "resnet8_cifar", *out).complains("--data")
    cli("study", "correlation", static, dynamic, "--layer", "layr2", *out).complains("did you mean 'layer")
    cli("study", "correlation", static, dynamic, "--thresholds", 0.1, 0.3, 0.5, *out).complains(
        "three falling"
    )
    cli("study", "correlation", static, dynamic, "--images", 0, *out).complains("--images must be at least 1")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("years of work")
    cli("study", "correlation", static, dynamic, "--out", tmp_path / "foreign").complains("are left alone")
    assert not (tmp_path / "c").exists()


def test_attention(cli, networks, tmp_path) -> None:
    answer = cli(
        "study",
        "attention",
        networks / "dynamic",
        "--limit",
        16,
        "--temperatures",
        1,
        8,
        "--out",
        tmp_path / "a",
    )
    assert answer.code == 0, answer.err
    assert "shuffled across images" in answer.out and "layer1.0.conv1" in answer.out
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert names >= {
        "attention.json",
        "layers.csv",
        "classes.csv",
        "accuracy.csv",
        "temperature.csv",
        "attention.png",
    }
    inside = cli("study", "attention", networks / "dynamic", "--limit", 8, "--temperatures", "--json").json
    assert inside["temperature"] == [] and inside["images"] == 8
    assert (networks / "dynamic" / "attention" / "attention.json").is_file()


def test_attention_bad_input(cli, networks, tmp_path) -> None:
    dynamic, out = networks / "dynamic", ("--out", tmp_path / "a")
    cli("study", "attention", networks / "static", *out).complains("has no dynamic kernels")
    cli("study", "attention", "resnet8_cifar", *out).complains("needs a trained network")
    cli("study", "attention", tmp_path / "nothing", *out).complains("there is no folder")
    cli("study", "attention", dynamic, "--temperatures", 0, *out).complains("temperature must be positive")
    cli("study", "attention", dynamic, "--limit", 0, *out).complains("--limit must be at least 1")
    cli("study", "attention", dynamic, "--data", "cifar10:" + str(tmp_path), *out).complains("CIFAR-10")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((dynamic / "config.json").read_bytes())
    (broken / "model.safetensors").write_bytes((dynamic / "model.safetensors").read_bytes()[:500])
    cli("study", "attention", broken, *out).complains("damaged or truncated")
    assert not (tmp_path / "a").exists()


def test_compactness(cli, compact) -> None:
    answer = cli("study", "compactness", *FAST, "--out", compact)
    assert answer.code == 0 and "trained" not in answer.err, answer.err
    assert "static" in answer.out and "ms, batch 1 (ratio)" in answer.out
    data = cli("study", "compactness", *FAST, "--out", compact, "--json").json
    assert data["methods"][0]["params"] > 0 and data["methods"][0]["ms_1"] > 0


def test_compactness_bad_input(cli, compact, tmp_path) -> None:
    cli("study", "compactness", *FAST, "--epochs", 2, "--out", compact).complains(
        "epochs = 1, but now it is 2"
    )
    cli("study", "compactness", "--methods", "dyconf", "--out", tmp_path / "x").complains(
        "unknown method", "dyconv"
    )
    cli("study", "compactness", "--methods", "dcd3", "--out", tmp_path / "x").complains(
        "unknown method 'dcd3'"
    )
    cli("study", "compactness", "--data", "scene", "--out", tmp_path / "x").complains("unknown data set")
    cli("study", "compactness", "--network", "resnet9_cifar", "--out", tmp_path / "x").complains(
        "unknown network"
    )
    cli("study", "compactness", "--epochs", 0, "--out", tmp_path / "x").complains("epochs must be at least 1")
    cli("study", "compactness", "--seeds", 0, "--out", tmp_path / "x").complains("--seeds must be at least 1")
    empty = tmp_path / "pictures"
    (empty / "train" / "cat").mkdir(parents=True)
    cli("study", "compactness", "--data", f"imagefolder:{empty}", "--out", tmp_path / "x").complains(
        "pictures"
    )
    assert not (tmp_path / "x").exists()
    cli("study", "correlation", "a", "b", "--out", compact).complains("belongs to the study 'compactness'")


def test_accuracy_macs_asks_for_what_makes_sense(cli, tmp_path) -> None:
    out = ("--out", tmp_path / "curves")
    study = ("study", "accuracy-macs")
    cli(*study, "--methods", "dynconf", *out).complains("unknown method 'dynconf'", "did you mean 'dynconv'")
    cli(*study, "--budgets", 0.5, 0.3, *out).complains("targets must rise and differ, got 0.5, 0.3")
    cli(*study, "--network", "resnet8_scene", *out).complains("did you mean 'resnet8_scenes'")
    cli(*study, "--engines", "onnxruntim", *out).complains("did you mean 'onnxruntime'")
    cli(*study, "--object-shares", 0.01, "--image-sizes", 48, *out).complains("choose image_size 64 or more")
    assert not (tmp_path / "curves").exists()
