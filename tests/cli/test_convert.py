from __future__ import annotations

import json
import os

import pytest

import dynaconv as dc


def test_report_and_saved_network(cli, tmp_path) -> None:
    out = tmp_path / "net"
    answer = cli("convert", "resnet8_cifar", "--preset", "paper", "--num-classes", "4", "--out", out)
    assert "3 blocks converted, 0 skipped" in answer.out and f"saved in {out}" in answer.out
    model = dc.load(out)
    assert len(dc.gates(model)) == 3
    assert model.fc.out_features == 4
    assert next(iter(dc.masked_blocks(model).values())).config.preset == "paper"
    assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]


def test_all_lists_every_module(cli) -> None:
    few, all_ = cli("convert", "resnet8_cifar").out, cli("convert", "resnet8_cifar", "--all").out
    assert (
        "layer1.0.conv1" not in few and "part of layer1.0" in all_ and "outside the residual blocks" in all_
    )


def test_kernels_alone_and_with_masks(cli, tmp_path) -> None:
    alone = cli("convert", "resnet8_cifar", "--kernels", "dyconv", "--out", str(tmp_path / "net")).out
    assert "dyconv, 4 kernels" in alone and "mask unit" not in alone
    both = cli("convert", "resnet8_cifar", "--kernels", "condconv", "--masks").out
    assert "condconv, 8 experts" in both and "squeeze mask unit" in both
    profiled = cli("profile", str(tmp_path / "net")).out
    assert "DYConv2d" in profiled and "build kernels" in profiled
    wrong = cli("convert", "resnet8_cifar", "--kernels", "dyconf")
    assert wrong.code == 2 and "did you mean 'dyconv'" in wrong.err


def test_rules_from_text_and_file(cli, tmp_path) -> None:
    rules = {"layer1": None, "re:layer[23]": {"granularity": 2, "unit": "conv1x1"}}
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(rules))
    for given in (json.dumps(rules), str(file)):
        data = cli("convert", "resnet8_cifar", "--rules", given, "--json").json
        outcome = {m["name"]: (m["status"], m["detail"]) for m in data["modules"]}
        assert outcome["layer1.0"] == ("skipped", "no rule asks for it")
        assert outcome["layer2.0"] == ("converted", "basic, conv1x1 mask unit")
    assert data["dense_macs_before"] == 12_500_992


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resnet9_cifar"], ["unknown model 'resnet9_cifar'", "did you mean"]),
        (["resnet8_cifar", "--preset", "papr"], ["unknown preset 'papr'; did you mean 'paper'"]),
        (["resnet8_cifar", "--unit", "sqeeze"], ["did you mean 'squeeze'"]),
        (["resnet8_cifar", "--granularity", "0"], ["granularity must be a whole number of pixels >= 1"]),
        (["resnet8_cifar", "--rules", "{nope"], ["--rules expects JSON", "{nope"]),
        (["resnet8_cifar", "--rules", '{"layer9": null}'], ["unknown module 'layer9'"]),
        (
            ["resnet8_cifar", "--rules", '{"layer1": {"granularty": 2}}'],
            ["granularty", "did you mean 'granularity'"],
        ),
        (["resnet8_cifar", "--rules", "[1]"], ["--rules expects JSON"]),
        (["resnet8_cifar", "--rules", "nothing.json"], ["there is no such file"]),
        (["resnet8_cifar", "--pretrained"], ["no pretrained weights"]),
        (["resnet8_cifar", "--input-size", "1", "32", "32"], ["takes 3 channels"]),
        (["dynconv_resnet8_cifar"], ["dynamic already"]),
    ],
)
def test_bad_input(cli, words, told) -> None:
    cli("convert", *words).complains(*told)


@pytest.mark.needs("torchvision")
def test_nothing_to_convert(cli) -> None:
    cli("convert", "torchvision:alexnet").complains("AlexNet has nothing to convert")
    cli("convert", "torchvision:resnet19").complains(
        "unknown torchvision model 'resnet19'", "did you mean 'resnet1"
    )


def test_output_that_is_a_file(cli, tmp_path) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    cli("convert", "resnet8_cifar", "--out", file).complains("cannot be a folder: it is a file")
    cli("convert", "resnet8_cifar", "--out", file / "below").complains("cannot be a folder", "is a file")
    assert file.read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_output_without_permission(cli, tmp_path) -> None:
    tmp_path.chmod(0o500)
    cli("convert", "resnet8_cifar", "--out", tmp_path / "net").complains("no permission")


def test_full_disk_leaves_nothing_behind(cli, tmp_path, monkeypatch) -> None:
    import errno

    from dynaconv.models import checkpoint

    def full(_state, path, **_):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "save_file", full)
    cli("convert", "resnet8_cifar", "--out", tmp_path / "net").complains("the disk is full")
    assert list((tmp_path / "net").iterdir()) == []
