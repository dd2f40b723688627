from __future__ import annotations

import csv
import json

import pytest
import torch
from tests.study.networks import dynamic_network, static_network
from torch import nn

from dynaconv import nn as dnn
from dynaconv.study import CorrelationTally
from dynaconv.study.correlation_run import correlate, noise
from dynaconv.study.correlation_write import write
from dynaconv.study.folder import StudyFolder
from dynaconv.study.layers import coefficients, dynamic_layers
from dynaconv.study.stages import stage_outputs

SIZE = (3, 16, 16)


def test_stages_of_networks() -> None:
    assert stage_outputs(static_network(), SIZE) == ["layer1", "layer2", "layer3"]
    assert stage_outputs(dynamic_network(), SIZE) == ["layer1", "layer2", "layer3"]
    with pytest.raises(ValueError, match="--layer"):
        stage_outputs(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), SIZE)


@pytest.mark.needs("torchvision")
def test_stages_of_networks_without_stage_names() -> None:
    import dynaconv as dc

    model = dc.create_model("torchvision:mobilenet_v2")
    ends = [f"features.{i}" for i in (1, 3, 6, 10, 13, 16, 17)]
    assert stage_outputs(model, (3, 32, 32)) == ends


@pytest.mark.parametrize("layer", [dnn.DYConv2d, dnn.CondConv2d, dnn.DyNetConv2d])
def test_features_and_kernels_are_those_of_the_networks(layer) -> None:
    static, dynamic = static_network(), dynamic_network(layer)
    images = torch.cat(list(noise(6, SIZE, 4)))
    found = correlate(static, dynamic, noise(6, SIZE, 4), SIZE)
    assert found["layers"] == ["layer2", "layer2"]
    assert found["kernel_layers"] == ["layer2.0.conv2", "layer2.0.conv2"]
    with torch.no_grad():
        x = dynamic.layer1(dynamic.relu(dynamic.bn1(dynamic.conv1(images))))
        tally = CorrelationTally()
        tally.add(dynamic.layer2(x).flatten(2))
        block = dynamic.layer2[0]
        inner = block.relu(block.bn1(block.conv1(x)))
        kernel = CorrelationTally()
        kernel.add(block.conv2.kernels(block.conv2.route(inner))[0].flatten(2))
    assert found["features"]["dynamic"]["histogram"] == pytest.approx(tally.result().histogram, abs=1e-3)
    assert found["features"]["dynamic"]["mean_abs"] == pytest.approx(tally.result().mean_abs, abs=1e-5)
    assert found["kernels"]["dynamic"]["mean_abs"] == pytest.approx(kernel.result().mean_abs, abs=1e-5)
    own = CorrelationTally()
    own.add(static.layer2[0].conv2.weight.detach().flatten(1)[None])
    assert found["kernels"]["static"] == own.result().to_dict()
    assert found["kernels"]["dynamic"]["images"] == 6 and found["kernels"]["static"]["images"] == 1


def test_networks_are_left_as_they_were() -> None:
    static, dynamic = static_network().train(), dynamic_network().train()
    before = {k: v.clone() for k, v in dynamic.state_dict().items()}
    correlate(static, dynamic, noise(2, SIZE, 2), SIZE)
    assert static.training and dynamic.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (static, dynamic) for m in n.modules())
    assert all(torch.equal(before[k], v) for k, v in dynamic.state_dict().items())


def test_coefficients_are_seen_and_replaced() -> None:
    model = dynamic_network()
    layers, x = dynamic_layers(model), torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(0))
    seen: dict[str, torch.Tensor] = {}
    with torch.no_grad(), coefficients(layers, lambda name, _layer, r: seen.__setitem__(name, r)):
        y = model(x)
    assert list(seen) == list(layers) and all(r.shape == (3, 4) for r in seen.values())
    with torch.no_grad():
        torch.testing.assert_close(model(x), y)
        with coefficients(layers, lambda name, _layer, _r: seen[name].flip(0)):
            assert not torch.allclose(model(x), y)
        torch.testing.assert_close(model(x), y)


def test_hooks_go_away_after_an_error() -> None:
    model = dynamic_network()

    def fail(*_args):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), coefficients(dynamic_layers(model), fail):
        model(torch.zeros(1, *SIZE))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_bad_input() -> None:
    static, dynamic = static_network(), dynamic_network()
    with pytest.raises(ValueError, match="no dynamic kernels"):
        correlate(static, static, noise(2, SIZE, 2), SIZE)
    with pytest.raises(ValueError, match="did you mean 'layer"):
        correlate(static, dynamic, noise(2, SIZE, 2), SIZE, layers=("layer22", None))
    with pytest.raises(ValueError, match="unknown dynamic convolution"):
        correlate(static, dynamic, noise(2, SIZE, 2), SIZE, kernels=(None, "conv1"))
    with pytest.raises(ValueError, match="no dynamic convolution"):
        correlate(static, dynamic, noise(2, SIZE, 2), SIZE, layers=("layer2", "bn1"))
    with pytest.raises(ValueError, match=r"must be \[N, C, H, W\]"):
        correlate(
            static, dynamic, noise(2, SIZE, 2), SIZE, layers=("fc", "fc"), kernels=("conv1", "layer1.0.conv1")
        )
    with pytest.raises(ValueError, match="no images"):
        correlate(static, dynamic, [], SIZE)


def test_files(tmp_path) -> None:
    found = correlate(static_network(), dynamic_network(), noise(2, SIZE, 2), SIZE, bins=20)
    facts = {
        "networks": ["a", "b"],
        "data": "noise",
        "thresholds": {"strong": 0.5, "middle": 0.3, "weak": 0.1},
    }
    data = write(StudyFolder(tmp_path, "correlation"), found, facts)
    assert json.loads((tmp_path / "correlation.json").read_text()) == data
    with open(tmp_path / "histogram.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 4 * 20
    assert sum(float(row["share"]) for row in rows) == pytest.approx(4)
    assert (tmp_path / "correlation.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "buckets.csv").read_text().startswith("of,network,layer,S,M,W,N,inside")
