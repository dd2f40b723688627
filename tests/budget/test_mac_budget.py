"""Budgets in training: the loss's terms, its gradient, schedules, state."""

from __future__ import annotations

import math

import pytest
import torch

import dynaconv as dc
from dynaconv.budget import GateSchedule, bounds, budget_loss


@pytest.fixture
def model(seed: int) -> torch.nn.Module:
    return dc.create_model("dynconv_resnet8_cifar", masking=dc.SpatialMasking(preset="paper"))


def test_loss_terms_follow_the_formulas() -> None:
    executed, dense = torch.tensor([30.0, 90.0, 5.0]), torch.tensor([100.0, 100.0, 50.0])
    loss = budget_loss(executed, dense, 0.3, 0.5)
    assert float(loss.ratio) == pytest.approx(0.5)
    assert float(loss.network) == pytest.approx(0.04)
    upper, lower = bounds(0.3, 0.5)
    assert (upper, lower) == (pytest.approx(0.65), pytest.approx(0.15))
    assert float(loss.blocks) == pytest.approx(((0.9 - upper) ** 2 + (lower - 0.1) ** 2) / 3)


def test_observed_ratio_is_counted_from_the_masks(model) -> None:
    budget = dc.MacBudget(model, 0.5, total_steps=10)
    x = torch.randn(3, 3, 32, 32)
    with dc.collect_masks(model) as masks, budget.observe() as cost:
        model(x)
    assert cost.ratio == pytest.approx(float(masks.conditional_ratio().mean()), rel=1e-6)
    assert set(cost.densities) == set(dc.gates(model))
    want = 10 * float((cost.terms.network + cost.terms.blocks).detach())
    assert float(cost.loss.detach()) == pytest.approx(want, rel=1e-5)


def test_every_gate_gets_a_gradient(model) -> None:
    budget = dc.MacBudget(model, 0.1, total_steps=10)
    with budget.observe() as cost:
        model(torch.randn(2, 3, 32, 32))
    cost.loss.backward()
    for name, gate in dc.gates(model).items():
        assert float(gate.conv.weight.grad.abs().sum()) > 0, name


def test_training_on_the_loss_alone_moves_to_the_target(seed: int) -> None:
    model = dc.create_model("dynconv_resnet8_cifar")
    budget = dc.MacBudget(model, 0.4, total_steps=80, schedule=GateSchedule(noise_until=0.5))
    optimizer = torch.optim.Adam([p for g in dc.gates(model).values() for p in g.parameters()], lr=0.05)
    x = torch.randn(4, 3, 16, 16)
    for _ in range(80):
        with budget.observe() as cost:
            model(x)
        optimizer.zero_grad()
        cost.loss.backward()
        optimizer.step()
        budget.step()
    assert abs(cost.ratio - 0.4) < 0.08


def test_ramp_lowers_the_target_gradually(model) -> None:
    budget = dc.MacBudget(model, 0.4, total_steps=10, ramp=0.5)
    seen = []
    for _ in range(7):
        seen.append(round(budget.current_target, 3))
        budget.step()
    assert seen == [1.0, 0.88, 0.76, 0.64, 0.52, 0.4, 0.4]


def test_schedules_are_state_of_the_gates(model) -> None:
    schedule = GateSchedule(noise_until=0.8, temperature=((0, 5.0), (0.3, 2.5), (0.6, 1.0)))
    budget = dc.MacBudget(model, 0.5, total_steps=10, schedule=schedule)
    seen = []
    for _ in range(11):
        gate = next(iter(dc.gates(model).values()))
        seen.append((float(gate.temperature), float(gate.noise)))
        budget.step()
    assert [t for t, _ in seen] == [5.0] * 3 + [2.5] * 3 + [1.0] * 5
    assert [n for _, n in seen] == [1.0] * 9 + [0.0] * 2
    other = dc.MacBudget(model, 0.5, total_steps=10, schedule=schedule)
    other.load_state_dict(budget.state_dict())
    assert other.progress == budget.progress == 1.0


def test_total_scope_subtracts_what_is_always_computed() -> None:
    model = dc.create_model("dynconv_resnet32_cifar")
    total, conditional, fixed = 69_124_096, 68_419_584, 442_368 + 262_144 + 1_241_664
    budget = dc.MacBudget(model, 0.5, total_steps=1, scope="total")
    assert budget.conditional_target == pytest.approx((0.5 * total - fixed) / conditional)
    with pytest.raises(ValueError, match=r"total target of 0.01 cannot be met: 0\.028 of the static"):
        dc.MacBudget(model, 0.01, total_steps=1, scope="total")


def test_parameter_groups_part_the_gates(model) -> None:
    budget = dc.MacBudget(model, 0.5, total_steps=1)
    own, gates = budget.param_groups(0.1, 5e-4, gate_lr_multiplier=0.1, gate_weight_decay=0.0)
    assert len(own["params"]) + len(gates["params"]) == len(list(model.parameters()))
    assert (gates["lr"], gates["weight_decay"]) == (pytest.approx(0.01), 0.0)
    assert {id(p) for p in gates["params"]} == {
        id(p) for g in dc.gates(model).values() for p in g.parameters()
    }


def test_presets_say_whether_gates_decay() -> None:
    def decays(config, **options) -> list[float]:
        model = dc.create_model("resnet8_cifar")
        dc.dynamize_(model, config)
        groups = dc.MacBudget(model, 0.5, total_steps=1).param_groups(0.1, 5e-4, **options)
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
        return [g["weight_decay"] for g in groups]

    paper, default = dc.SpatialMasking(preset="paper"), dc.SpatialMasking()
    assert decays(default) == [5e-4, 0.0] and decays(paper) == [5e-4, 5e-4]
    assert decays(dc.ChannelGate()) == [5e-4, 0.0] and decays(dc.LayerGate(preset="paper")) == [5e-4, 5e-4]
    assert decays({"layer1": paper, "layer2": default}) == [5e-4, 0.0, 5e-4]
    assert decays(paper, gate_weight_decay=0.1) == [5e-4, 0.1]


@pytest.mark.parametrize("target", [0.0, -0.1, 1.01, math.nan])
def test_target_outside_the_unit_interval(model, target: float) -> None:
    with pytest.raises(ValueError, match=r"target must lie in \(0, 1\]"):
        dc.MacBudget(model, target, total_steps=1)


def test_other_bad_input(model) -> None:
    with pytest.raises(TypeError, match="target must be a number"):
        dc.MacBudget(model, "half", total_steps=1)
    with pytest.raises(ValueError, match="no gates; call dc.dynamize_"):
        dc.MacBudget(dc.create_model("resnet8_cifar"), 0.5, total_steps=1)
    with pytest.raises(ValueError, match="unknown scope 'totl'; did you mean 'total'"):
        dc.MacBudget(model, 0.5, total_steps=1, scope="totl")
    with pytest.raises(ValueError, match="ramp must lie in"):
        dc.MacBudget(model, 0.5, total_steps=1, ramp=1.0)
