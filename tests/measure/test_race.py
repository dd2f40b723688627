"""The race: interleaved times of everything, nothing timed that computes something else."""

from __future__ import annotations

import copy

import pytest
import torch

import dynaconv as dc
from dynaconv.cost import compare_latency
from dynaconv.measure import race as room
from dynaconv.measure.race import EnginesDisagree, Race, Runner, race
from dynaconv.measure.untrained import settle_norms_


@pytest.fixture(scope="module")
def networks():
    torch.manual_seed(0)
    dense = settle_norms_(
        dc.models.CifarResNet(8, width=8, stem_stride=2, image_size=32), torch.randn(4, 3, 32, 32)
    )
    dynamic = copy.deepcopy(dense)
    dc.dynamize_(dynamic)
    return dense, dynamic.eval()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(
        room, "compare_latency", lambda f, **o: compare_latency(f, **{**o, "min_round_ms": 0.01})
    )


@pytest.fixture
def stand_in(monkeypatch):
    """dynaconv.compile that hands back a copy of the network, spoilt by `change`."""

    def use(change=lambda y: y) -> list:
        calls = []

        class Copy(torch.nn.Module):
            def __init__(self, model):
                super().__init__()
                self.inner = copy.deepcopy(model)

            def forward(self, x):
                return change(self.inner(x))

        def stand_in_for_compile(model, example, *, dtype=None, **_):
            calls.append((model, dtype))
            return Copy(model).eval()

        monkeypatch.setattr(dc, "compile", stand_in_for_compile, raising=False)
        # Names of gates decide their forced masks, and the wrapper above adds a level.
        monkeypatch.setattr(room, "forced", lambda m, d: whole(getattr(m, "inner", m), d))
        return calls

    whole = room.forced
    return use


def test_times_of_everything_under_the_same_masks(networks, quick, stand_in) -> None:
    dense, dynamic = networks
    calls = stand_in()
    runners = [Runner("half", dynamic, 0.5), Runner("tenth", dynamic, 0.1), Runner("own", dynamic)]
    batches = list(torch.randn(3, 2, 3, 32, 32))
    told = []
    result = race(dense, runners, batches, rivals=["eager"], rounds=2, progress=told.append)
    assert set(result.dense) == {"eager", "dynaconv"}
    assert set(result.dynamic) == {"half", "tenth", "own"}
    for times in (*result.dynamic.values(), result.dense):
        for measured in times.values():
            assert 0 < measured["min_ms"] <= measured["median_ms"]
    assert result.left_out == {} and max(result.deviations.values()) < 1e-5
    assert result.macs_ratio["tenth"] < result.macs_ratio["half"] < result.macs_ratio["own"]
    assert len(calls) == 4 and calls[0][0] is dense and told[-1] == "timing"
    assert not any(m._forward_hooks for m in dynamic.modules())


def test_macs_count_the_whole_network_with_gates_under_the_forced_masks(networks, quick, stand_in) -> None:
    dense, dynamic = networks
    stand_in()
    x = torch.randn(2, 3, 32, 32)
    result = race(
        dense, [Runner("all", dynamic, 1.0), Runner("none", dynamic, 0.0)], x, rivals=["eager"], rounds=1
    )
    with room.forced(dynamic, 0.0):
        least = dc.profile(dynamic, x, include_linear=True).macs_ratio
    assert result.macs_ratio["all"] > 1 and result.macs_ratio["none"] == pytest.approx(least)


@pytest.mark.parametrize("density", [None, 0.5])
def test_nothing_is_timed_when_our_engine_is_wrong(networks, stand_in, monkeypatch, density) -> None:
    stand_in(lambda y: y * 1.1)
    monkeypatch.setattr(room, "compare_latency", lambda *_a, **_o: pytest.fail("timed"))
    with pytest.raises(EnginesDisagree, match=r"dynaconv on static differs .* 1\.0e-01 .*nothing was timed"):
        race(networks[0], [Runner("any", networks[1], density)], torch.randn(1, 3, 32, 32), rivals=["eager"])


def test_a_network_that_our_engine_refuses_is_timed_without_it(networks, quick, monkeypatch) -> None:
    def refuse(*_a, **_o):
        raise ValueError("this network has no batch axis")

    monkeypatch.setattr(dc, "compile", refuse, raising=False)
    result = race(
        networks[0], [Runner("x", networks[1], 0.5)], torch.randn(1, 3, 32, 32), rivals=["eager"], rounds=1
    )
    assert "no batch axis" in result.left_out["dynaconv"]
    assert set(result.dense) == {"eager"} and set(result.dynamic["x"]) == {"eager"}


def test_the_fastest_of_a_precision() -> None:
    times = {name: {"min_ms": ms} for name, ms in (("eager", 3.0), ("openvino", 1.0), ("onnxruntime", 2.0))}
    result = Race(dense={**times, "dynaconv": {"min_ms": 1.5}})
    assert result.fastest() == "dynaconv" and result.fastest(ours=False) == "onnxruntime"
    assert result.fastest("bfloat16") == "openvino"
    assert Race(dense={"eager": {"min_ms": 3.0}}).fastest("bfloat16") == "eager"


def test_rounds_end_after_some_seconds() -> None:
    times = compare_latency({"a": lambda: None}, rounds=50, min_round_ms=0.01, seconds=0.0)
    repeats = compare_latency({"a": lambda: None}, rounds=1, min_round_ms=0.0)["a"]["runs"]
    assert repeats == 1 and times["a"]["runs"] % 3 == 0


def test_untrained_branches_compute_something(networks) -> None:
    fresh = dc.create_model("resnet8_cifar")
    torch.nn.init.zeros_(fresh.layer1[0].bn2.weight)
    settled = settle_norms_(fresh, torch.randn(4, 3, 32, 32))
    assert not settled.training and bool((settled.layer1[0].bn2.weight >= 0.5).all())
    assert settled.layer1[0].bn2.momentum == 0.1
