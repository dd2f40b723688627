"""Networks by name, saving and loading."""

from __future__ import annotations

import json
import re

import pytest
import torch

import dynaconv as dc
from dynaconv.models.dynamic import parse_name


def test_names_and_shapes() -> None:
    names = dc.list_models()
    assert {f"resnet{d}_cifar" for d in (8, 14, 20, 26, 32)} <= set(names)
    # Networks with dynamic kernels have tests of their own.
    for name in (n for n in names if parse_name(n) is None):
        model = dc.create_model(name, num_classes=4).eval()
        channels, height, width = model.input_size
        # Keypoint networks answer with a map of a quarter of the size for each point, once for every stack.
        stacks = re.search(r"hourglass(\d)_", name)
        expected = (1, int(stacks[1]), 4, height // 4, width // 4) if stacks else (1, 4)
        with torch.no_grad():
            assert model(torch.randn(1, channels, height, width)).shape == expected, name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet9_cifar", "unknown model 'resnet9_cifar'; did you mean 'resnet8_cifar'"),
        ("timm:resnet51", "unknown timm model 'resnet51'; did you mean"),
    ],
)
@pytest.mark.needs("timm")
def test_unknown_names_suggest_the_nearest(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dc.create_model(name)


def test_bad_depth_and_missing_weights() -> None:
    with pytest.raises(ValueError, match=r"depth must be 6n \+ 2"):
        dc.models.CifarResNet(10)
    with pytest.raises(ValueError, match="no pretrained weights"):
        dc.create_model("resnet8_cifar", pretrained=True)


@pytest.mark.needs("timm", "torchvision")
@pytest.mark.parametrize(
    "name", ["resnet14_scenes", "timm:resnet18", "torchvision:resnet18", "timm:mobilenetv2_050"]
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_saved_networks_come_back_the_same(name: str, dynamic: bool, tmp_path, seed: int) -> None:
    model = dc.create_model(name, num_classes=5).eval()
    if dynamic:
        dc.dynamize_(model, dc.SpatialMasking(preset="paper", unit="conv1x1"))
    dc.save(model, tmp_path / "run" / "model", metadata={"classes": list("abcde")})
    loaded = dc.load(tmp_path / "run")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))
    assert sorted(p.name for p in (tmp_path / "run" / "model").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]


def test_own_architectures_need_a_hint(tmp_path, seed: int) -> None:
    model = torch.nn.Sequential(dc.models.BasicBlock(3, 3))
    dc.dynamize_(model)
    with pytest.raises(ValueError, match="cannot tell how to rebuild this Sequential; pass arch="):
        dc.save(model, tmp_path / "m")
    dc.save(model, tmp_path / "m", arch={"name": "mine"})
    loaded = dc.load(tmp_path / "m", model=torch.nn.Sequential(dc.models.BasicBlock(3, 3)))
    assert torch.equal(loaded[0].block.conv1.weight, model[0].block.conv1.weight)


@pytest.mark.needs("torchvision")
def test_no_weights_are_fetched_for_a_backbone(monkeypatch) -> None:
    monkeypatch.setattr(
        torch.hub, "load_state_dict_from_url", lambda *_, **__: pytest.fail("fetches weights")
    )
    model = dc.create_model("torchvision:lraspp_mobilenet_v3_large", num_classes=3).eval()
    assert model(torch.zeros(1, 3, 64, 64))["out"].shape == (1, 3, 64, 64)


class Versioned(torch.nn.Sequential):
    """Asks which version of it wrote a state, as torchvision's MNASNet does."""

    _version = 2

    def _load_from_state_dict(self, state, prefix, metadata, *args) -> None:
        assert metadata.get("version") == 2, "a state without its version"
        super()._load_from_state_dict(state, prefix, metadata, *args)


def test_modules_are_told_the_version_of_their_state(tmp_path) -> None:
    model = Versioned(dc.models.BasicBlock(3, 3))
    dc.dynamize_(model, input_size=(3, 8, 8))
    dc.save(model, tmp_path / "m", arch="mine")
    loaded = dc.load(tmp_path / "m", model=Versioned(dc.models.BasicBlock(3, 3)))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in loaded.state_dict().items())


def test_damaged_files_get_one_sentence(tmp_path) -> None:
    folder = dc.save(dc.create_model("dynconv_resnet8_cifar"), tmp_path / "m")
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="model.safetensors is damaged or truncated"):
        dc.load(folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors is missing"):
        dc.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is damaged"):
        dc.load(folder)
    (folder / "config.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(ValueError, match="not a dynaconv network of format 1"):
        dc.load(folder)
    with pytest.raises(FileNotFoundError, match="no saved network in"):
        dc.load(tmp_path / "nothing")
    weights.write_bytes(whole)
    arch = {"name": "resnet8_cifar"}
    damaged = {
        "config.json is damaged \\('name' must be a str\\); save the network again": {"arch": {}, "conversion": {}},
        "config.json is damaged \\('conversion' must be a dict\\)": {"arch": arch},
        "asks for resnet8_cifar with options that it does not take .*'spam'": {
            "arch": {**arch, "spam": 3}, "conversion": {},
        },
    }  # fmt: skip
    for words, config in damaged.items():
        (folder / "config.json").write_text(json.dumps({"format": 1, **config}))
        with pytest.raises(ValueError, match=words):
            dc.load(folder)


def test_another_number_of_classes(tmp_path) -> None:
    folder = dc.save(dc.create_model("resnet8_cifar", num_classes=10), tmp_path / "m")
    with pytest.raises(ValueError, match="has 10 classes, but 7 are needed"):
        dc.load(folder, num_classes=7)


def test_a_failed_write_leaves_the_old_network(tmp_path, monkeypatch) -> None:
    model = dc.create_model("resnet8_cifar")
    folder = dc.save(model, tmp_path / "m")
    before = (folder / "model.safetensors").read_bytes()

    def full(*_args, **_options) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynaconv.models.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        dc.save(dc.create_model("resnet8_cifar"), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    assert sorted(p.name for p in folder.iterdir()) == ["config.json", "model.safetensors"]
