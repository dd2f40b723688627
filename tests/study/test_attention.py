from __future__ import annotations

import csv
import json
import math

import pytest
import torch
from tests.study.networks import static_network
from tests.train.synthetic import Bundle, Colours
from torch import nn

from dynaconv.nn import set_temperature
from dynaconv.study.attention import Batches, attention, combinations, evaluating, observe
from dynaconv.study.attention_figure import figure
from dynaconv.study.attention_stats import PartTally, entropy
from dynaconv.study.attention_write import write
from dynaconv.study.cell import Cell, build
from dynaconv.study.folder import StudyFolder
from dynaconv.study.interventions import INTERVENTIONS, Intervention, applies, at_temperature, intervene
from dynaconv.study.layers import coefficients, dynamic_layers
from dynaconv.study.methods import parse_method
from dynaconv.study.parts import Part, parts_of
from dynaconv.study.settings import CompactnessSettings

METHODS = ("condconv4", "dyconv", "dynet", "dcd", "odconv", "odconv4")
CLASSES = list("abcd")


def network(method: str) -> nn.Module:
    """A ResNet-8 of width 4, whose attention is made to matter."""
    model = build(CompactnessSettings(width=4), Cell(parse_method(method), 0), Bundle()).eval()
    set_temperature(model, 0.2)
    for name, parameter in model.named_parameters():
        if "router" in name and parameter.dim() == 2 and method != "dcd":
            parameter.data.mul_(4)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_parts_cover_the_coefficients(method) -> None:
    model, seen = network(method), {}
    layers = dynamic_layers(model)
    with torch.no_grad(), coefficients(layers, lambda name, _layer, r: seen.__setitem__(name, r)):
        model(Colours(3, 0).__getitems__([0, 1, 2])[0])
    assert set(seen) == set(layers)
    for name, routing in seen.items():
        parts = parts_of(layers[name])
        assert sum(p.groups * p.size for p in parts) == routing[0].numel()
        rebuilt = torch.zeros_like(routing)
        for part in parts:
            values = part.read(routing)
            rebuilt = part.write(rebuilt, values)
            if part.kind == "softmax":
                torch.testing.assert_close(values.sum(2), torch.ones(3, part.groups))
            if part.top is not None:
                assert values.min() >= 0 and values.max() <= part.top
        assert torch.equal(rebuilt, routing)


def test_entropy_by_hand() -> None:
    values = torch.tensor(
        [[0.5, 0.5, 0.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0]]
    )
    assert entropy(values).tolist() == pytest.approx([0.5, 1.0, 1.0, 0.5])
    assert math.isnan(float(entropy(torch.ones(1))))


def test_tally_is_a_plain_mean() -> None:
    part = Part("experts", "softmax", 0, 1, 3)
    routing = torch.softmax(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), 1)
    labels = torch.arange(40) % 4
    tally = PartTally(part, 5)
    for start in range(0, 40, 16):
        tally.add(routing[start : start + 16], labels[start : start + 16])
    found = tally.result()
    assert found["mean"] == pytest.approx(1 / 3)
    assert found["std_over_images"] == pytest.approx(float(routing.std(0, correction=0).mean()), rel=1e-5)
    assert found["entropy"] == pytest.approx(float(entropy(routing).mean()))
    assert found["entropy_std"] == pytest.approx(float(entropy(routing).std(correction=0)), rel=1e-5)
    assert found["largest_share"] == pytest.approx(float(routing.max(1).values.mean()))
    means = torch.stack([routing[labels == c].mean(0) for c in range(4)])
    between = (means - routing.mean(0)).square().mean(0).sum() / routing.var(0, correction=0).sum()
    assert found["class_share"] == pytest.approx(float(between), rel=1e-4)
    rows = tally.by_class()
    assert [row["class"] for row in rows] == [0, 1, 2, 3]
    assert rows[2]["means"] == pytest.approx(means[2].tolist())
    assert sum(found["histogram"]) == pytest.approx(1)


def _change(name: str, routing: torch.Tensor, part: Part | None = None) -> torch.Tensor:
    class Layer(nn.Module):
        pass

    change = Intervention(name, {"layer": routing.mean(0, keepdim=True)})
    change.start_batch(len(routing))
    return change._changed("layer", part or Part("experts", "softmax", 0, 1, routing.shape[1]), routing)[:, 0]


def test_interventions_by_hand() -> None:
    routing = torch.softmax(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), 1)
    torch.testing.assert_close(_change("mean kernel", routing), torch.full((6, 4), 0.25))
    sharp = _change("arg-max", routing)
    assert torch.equal(sharp.argmax(1), routing.argmax(1)) and (sharp > 0).sum() == 6
    torch.testing.assert_close(sharp.sum(1), torch.ones(6))
    torch.testing.assert_close(_change("mean attention", routing), routing.mean(0).expand(6, 4))
    across = _change("shuffled across images", routing)
    assert sorted(across.tolist()) == sorted(routing.tolist())
    assert not any(torch.equal(a, b) for a, b in zip(across, routing, strict=True))
    within = _change("shuffled per image", routing)
    torch.testing.assert_close(within.sort(1).values, routing.sort(1).values)
    assert not torch.equal(within, routing)


def test_sigmoid_mixtures_keep_their_sum() -> None:
    routing, part = (
        torch.rand(5, 4, generator=torch.Generator().manual_seed(0)),
        Part("experts", "sigmoid", 0, 1, 4),
    )
    for name in ("mean kernel", "arg-max", "shuffled per image"):
        torch.testing.assert_close(_change(name, routing, part).sum(1), routing.sum(1))


def test_what_applies_to_what() -> None:
    gain, matrix = Part("taps", "gain", 0, 1, 9), Part("fusion", "matrix", 0, 1, 16, None)
    softmax = Part("experts", "softmax", 0, 1, 4)
    assert [applies(name, softmax) for name in INTERVENTIONS] == [True] * 6
    assert [applies(name, gain) for name in INTERVENTIONS] == [True, False, False, True, True, True]
    assert [applies(name, matrix) for name in INTERVENTIONS] == [True, False, False, True, True, False]


def test_mean_kernel_is_the_static_convolution() -> None:
    """DY-Conv's mean kernel is what `to_conv` gives."""
    model = network("dyconv")
    layer = model.layer1[0].conv1
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    change = Intervention("mean kernel", {})
    with torch.no_grad(), intervene({"layer": layer}, change):
        y = layer(x)
    torch.testing.assert_close(y, layer.to_conv()(x))


@pytest.mark.parametrize("method", METHODS)
def test_a_study_of_every_method(method, tmp_path) -> None:
    model = network(method).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = attention(model, Colours(24, 0), CLASSES, batch_size=8, temperatures=(0.5, 4.0))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert model.training and not any(m._forward_pre_hooks for m in model.modules())
    assert found["images"] == 24
    names = {row["intervention"] for row in found["accuracy"]}
    mixes = method != "odconv" and method != "dcd"
    assert names == set(INTERVENTIONS) - (set() if mixes else {"mean kernel", "arg-max"})
    tempered = method in ("dyconv", "odconv", "odconv4")
    assert [row["temperature"] for row in found["temperature"]] == ([0.5, 4.0] if tempered else [])
    assert len(found["trained_temperature"]) == int(tempered)
    assert {row["class"] for row in found["classes"]} == set(CLASSES)
    parts = {row["part"] for row in found["accuracy"]}
    assert (len(parts) > 1) == (method in ("dcd", "odconv", "odconv4"))
    normal = found["accuracy"][0]["loss"]
    assert any(abs(row["loss"] - normal) > 1e-5 for row in found["accuracy"][1:])
    facts = {"network": "runs/x", "data": "colours", "machine": "a machine"}
    data = write(StudyFolder(tmp_path, "attention"), found, facts)
    assert json.loads((tmp_path / "attention.json").read_text()) == data
    assert (tmp_path / "attention.png").read_bytes().startswith(b"\x89PNG")
    with open(tmp_path / "accuracy.csv", newline="") as stream:
        assert [float(row["loss"]) for row in csv.DictReader(stream)] == [
            r["loss"] for r in found["accuracy"]
        ]
    assert (tmp_path / "temperature.csv").exists() == tempered


def test_lower_temperature_lower_entropy() -> None:
    found = attention(network("dyconv"), Colours(16, 0), CLASSES, temperatures=(0.1, 1.0, 30.0))
    values = [row["entropy"] for row in found["temperature"]]
    assert values[0] < values[1] < values[2] and values[2] > 0.99


def test_normal_is_the_network_itself() -> None:
    model, data = network("odconv4"), Colours(24, 0)
    found = attention(model, data, CLASSES, temperatures=())
    images, labels = data.__getitems__(list(range(24)))
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(images), labels)
    assert found["accuracy"][0]["loss"] == pytest.approx(float(loss), rel=1e-5)


def test_temperature_comes_back_after_an_error() -> None:
    model = network("dyconv")
    with pytest.raises(RuntimeError, match="stop"), at_temperature(model, 7.0):
        assert float(model.layer1[0].conv1.router.temperature) == 7.0
        raise RuntimeError("stop")
    assert float(model.layer1[0].conv1.router.temperature) == pytest.approx(0.2)


def test_pictures_are_shuffled_alike_at_every_pass() -> None:
    batches = Batches(Colours(10, 0), 4, 9, 0)
    first, second = ([labels.tolist() for _, labels in batches] for _ in range(2))
    assert first == second and len(batches) == 9 and [len(b) for b in first] == [4, 4, 1]


def test_combinations_name_single_parts_only_where_there_are_several() -> None:
    model = network("dyconv")
    layers = dynamic_layers(model)
    with evaluating(model):
        _, tallies = observe(model, layers, Batches(Colours(4, 0), 4, None, 0), 4)
    assert all(part is None for _, part in combinations(tallies))


def test_bad_input() -> None:
    data = Colours(4, 0)
    with pytest.raises(ValueError, match="no dynamic kernels"):
        attention(static_network(), data, CLASSES)
    with pytest.raises(ValueError, match="no images"):
        attention(network("dyconv"), Colours(0, 0), CLASSES)
    with pytest.raises(ValueError, match="temperature must be positive"):
        attention(network("dyconv"), data, CLASSES, temperatures=(0.0,))


def test_figure_of_many_layers() -> None:
    found = attention(network("odconv4"), Colours(8, 0), CLASSES, temperatures=(1.0,))
    found["layers"] = [{**row, "layer": f"{row['layer']}.{i}"} for i in range(5) for row in found["layers"]]
    assert figure(found, "a network").startswith(b"\x89PNG")
