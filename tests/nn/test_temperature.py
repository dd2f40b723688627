"""The temperature of attention: a buffer that checkpoints keep, set model-wide, annealed per iteration."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import dynaconv as dc
from dynaconv.nn import CondConv2d, DYConv2d, ODConv2d, TemperatureSchedule, set_temperature


def network(temperature: float = 1.0) -> nn.Module:
    return nn.Sequential(
        DYConv2d(3, 4, 3, temperature=temperature),
        nn.Sequential(ODConv2d(4, 4, 3, num_kernels=2, temperature=temperature), nn.ReLU()),
        CondConv2d(4, 4, 1),
    )


def temperatures(model: nn.Module) -> list[float]:
    return [float(b) for name, b in model.named_buffers() if name.endswith("temperature")]


def test_is_a_persistent_scalar() -> None:
    model = network(7.0)
    state = model.state_dict()
    names = [n for n in state if "temperature" in n]
    assert names == ["0.router.temperature", "1.0.router.temperature"]
    for name in names:
        assert state[name].shape == () and state[name].dtype == torch.float32 and float(state[name]) == 7.0
    assert not any("temperature" in n for n, _ in model.named_parameters())


def test_a_fresh_network_that_loads_weights_has_their_temperature() -> None:
    torch.manual_seed(0)
    trained = network().eval()
    for name, parameter in trained.named_parameters():
        if "router" in name:
            nn.init.normal_(parameter)
    set_temperature(trained, 0.3)
    x = torch.randn(2, 3, 9, 9)
    fresh = network(30.0).eval()
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh(x), trained(x))
    set_temperature(fresh, 30.0)
    assert not torch.allclose(fresh(x), trained(x))
    assert temperatures(copy.deepcopy(trained)) == temperatures(trained) == pytest.approx([0.3, 0.3])


def test_an_average_of_weights_follows_it() -> None:
    model = network(30.0)
    average = AveragedModel(model, use_buffers=True)
    set_temperature(model, 5.0)
    average.update_parameters(model)
    assert temperatures(average) == [5.0, 5.0]


def test_one_call_sets_all_but_the_gates() -> None:
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, (dc.SpatialMasking(temperature=0.7), dc.DYConv()))
    assert set_temperature(model, 4.0) == len(dc.dynamic_layers(model)) > 0
    assert all(float(g.temperature) == pytest.approx(0.7) for g in dc.gates(model).values())
    assert all(float(y.router.temperature) == 4.0 for y in dc.dynamic_layers(model).values())
    assert set_temperature(nn.Conv2d(3, 3, 1), 4.0) == 0
    for bad in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="temperature must be positive, got"):
            set_temperature(model, bad)
    assert all(float(y.router.temperature) == 4.0 for y in dc.dynamic_layers(model).values())


def test_schedule_falls_linearly_and_stays() -> None:
    model = network()
    schedule = TemperatureSchedule(model, steps=8)
    seen = [temperatures(model)[0]]
    for i in range(1, 11):
        told = schedule.step()
        seen.append(temperatures(model)[0])
        assert told == pytest.approx(1 + 29 * max(0, 1 - i / 8), abs=1e-9)
        assert seen[-1] == pytest.approx(told, rel=1e-6)
    assert seen[0] == 30.0 and seen[8:] == [1.0, 1.0, 1.0] and seen == sorted(seen, reverse=True)
    assert temperatures(model) == [1.0, 1.0]


def test_schedule_resumes() -> None:
    model = network()
    schedule = TemperatureSchedule(model, 20.0, 2.0, steps=10)
    for _ in range(4):
        schedule.step()
    saved, weights = schedule.state_dict(), model.state_dict()
    other = network()
    other.load_state_dict(weights)
    assert temperatures(other) == temperatures(model)
    resumed = TemperatureSchedule(other, steps=3)
    resumed.load_state_dict(saved)
    assert temperatures(other) == temperatures(model)
    for _ in range(8):
        assert resumed.step() == schedule.step()
    assert temperatures(other) == temperatures(model) == [2.0, 2.0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps must be a whole number >= 1, got 0"),
        ({"steps": 0.5}, "steps must be a whole number >= 1, got 0.5"),
        ({"steps": 5, "start": 0.0}, "start must be positive, got 0.0"),
        ({"steps": 5, "end": -1.0}, "end must be positive, got -1.0"),
    ],
)
def test_bad_schedules(options: dict, message: str) -> None:
    model = network(3.0)
    with pytest.raises(ValueError, match=message):
        TemperatureSchedule(model, **options)
    assert temperatures(model) == [3.0, 3.0]
