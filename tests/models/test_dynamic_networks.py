"""Networks with dynamic kernels by name: all of them build, run, train and come back from a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import dynaconv as dc
from dynaconv.convert import dynamic_layers
from dynaconv.models.dynamic import listed_names

pytestmark = pytest.mark.needs("torchvision")

# One network of each method and each kind of base, with its number of dynamic layers.
SMALL = {
    "condconv2_resnet8_cifar": 7,
    "dyconv3_resnet8_scenes": 8,
    "dynet_resnet14_cifar": 12,
    "dcd_resnet8_cifar": 7,
    "odconv1_resnet8_cifar": 6,
    "weightnet_resnet8_cifar": 8,
    "condconv4_mobilenetv2_010": 19,
    "dynet_mobilenetv2_010": 50,
    "odconv2_mobilenetv3_small_050": 33,
    "dcd_efficientnet_b0": 31,
    "weightnet_shufflenetv2_050": 54,
    "dymobile_025": 51,
    "dyresnet18": 16,
    "dyshufflenetv2_050": 48,
    "dymobilenetv3_small_050": 32,
}


def image(model: nn.Module, batch: int = 2) -> torch.Tensor:
    channels, size, _ = model.input_size
    return torch.randn(batch, channels, min(size, 64), min(size, 64))


@pytest.mark.parametrize("name", listed_names())
def test_every_listed_name_builds(name: str) -> None:
    with torch.device("meta"):
        model = dc.create_model(name, num_classes=7)
    assert model.arch == {"name": name, "num_classes": 7, "in_chans": 3}
    assert bool(dynamic_layers(model)) != name.startswith("fix")
    assert len(model.input_size) == 3


@pytest.mark.parametrize("name", SMALL)
def test_small_ones_run_and_train(name: str, seed: int) -> None:
    model = dc.create_model(name, num_classes=5, in_chans=2)
    assert len(dynamic_layers(model)) == SMALL[name]
    x = image(model)
    y = model(x)
    assert y.shape == (2, 5) and torch.isfinite(y).all()
    y.square().sum().backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert not missing, missing
    with torch.no_grad():
        assert model.eval()(image(model, 1)).shape == (1, 5)


def test_experts_start_apart_and_networks_apart(seed: int) -> None:
    first, second = (dc.create_model("condconv4_resnet8_cifar") for _ in range(2))
    weight = first.layer3[0].block.conv1.weight
    assert (weight[0] - weight[1]).abs().max() > 0.01
    assert not torch.equal(weight, second.layer3[0].block.conv1.weight)
    # One expert has the spread that the static network's initialiser gives it: fan out, 3 * 3 * 64.
    assert 0.8 < float(weight.detach().std()) / (2 / (9 * 64)) ** 0.5 < 1.2


def test_another_config_than_the_published_one() -> None:
    wide = dc.CondConv(num_experts=2, init="fresh", first_block=0, classifier=False)
    model = dc.create_model("condconv8_resnet8_cifar", kernels=wide)
    assert len(dynamic_layers(model)) == 6 and isinstance(model.fc, nn.Linear)
    again = dc.create_model(**model.arch)
    assert {k: v.shape for k, v in again.state_dict().items()} == {
        k: v.shape for k, v in model.state_dict().items()
    }
    with pytest.raises(
        ValueError, match="condconv8_resnet8_cifar needs kernels of the method condconv, got dyconv"
    ):
        dc.create_model("condconv8_resnet8_cifar", kernels=dc.DYConv())


def test_efficientnet_condconv_has_its_own_dropout() -> None:
    with torch.device("meta"):
        model = dc.create_model("condconv4_efficientnet_b0")
        assert model.classifier[0].p == 0.25
        assert dc.create_model("condconv4_efficientnet_b0", dropout=0.1).classifier[0].p == 0.1


@pytest.mark.parametrize(
    "name",
    [
        "condconv2_resnet8_cifar",
        "dyconv2_resnet8_cifar",
        "dcd_resnet8_cifar",
        "dymobile_025",
        "fixmobile_025",
    ],
)
def test_saved_networks_come_back(name: str, tmp_path, seed: int) -> None:
    model = dc.create_model(name, num_classes=3, in_chans=1).eval()
    dc.save(model, tmp_path / "model")
    loaded = dc.load(tmp_path / "model")
    x = image(model)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_unknown_names_suggest_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown model 'odconv4_resnet19'; did you mean 'odconv4_resnet18'"):
        dc.create_model("odconv4_resnet19")
    with pytest.raises(
        ValueError, match="unknown model 'condconv_resnet18'; did you mean 'condconv8_resnet18'"
    ):
        dc.create_model("condconv_resnet18")
    with pytest.raises(ValueError, match="ShuffleNetV2 has these widths"):
        dc.create_model("condconv8_shufflenetv2_075")
