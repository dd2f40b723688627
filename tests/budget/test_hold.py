"""Integral control: a training that is pulled away from its budget still ends there."""

from __future__ import annotations

import pytest
import torch

import dynaconv as dc
from dynaconv.budget import GateSchedule
from dynaconv.budget.hold import Hold

QUIET = GateSchedule(noise_until=0.0)


def tiny(gate: object) -> torch.nn.Module:
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", width=4)
    dc.dynamize_(model, gate, input_size=(3, 16, 16))
    return model.train()


def ends_at(gate: object, hold: bool, pull: float = 3.0, steps: int = 60) -> float:
    """Executed share after a training whose task wants everything open."""
    model = tiny(gate)
    budget = dc.MacBudget(
        model, 0.5, total_steps=steps, schedule=QUIET, hold=hold, loss="network", anneal=0.01
    )
    optimizer = torch.optim.SGD(budget.param_groups(0.0, gate_lr_multiplier=1.0), lr=0.0)
    optimizer.param_groups[-1]["lr"] = 0.2
    shares = []
    for _ in range(steps):
        with budget.observe() as cost:
            model(torch.randn(4, 3, 16, 16))
        loss = cost.loss - pull * cost.terms.ratio.float()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
        shares.append(cost.ratio)
    return sum(shares[-20:]) / 20


def test_a_pull_of_the_task_is_balanced() -> None:
    gate = dc.SpatialMasking()
    missed, held = abs(ends_at(gate, False) - 0.5), abs(ends_at(gate, True) - 0.5)
    assert missed > 0.08 and held < 0.03


def test_nothing_is_added_up_while_the_ramp_lasts() -> None:
    model = tiny(dc.SpatialMasking())
    budget = dc.MacBudget(model, 0.2, total_steps=10, ramp=0.5, hold=True)
    for index in range(8):
        with budget.observe():
            model(torch.randn(2, 3, 16, 16))
        budget.step()
        assert (budget.hold.shift == 0) == (index < 5)
    # A step that observed nothing adds nothing.
    before = budget.hold.shift
    budget.step()
    assert budget.hold.shift == before


def test_a_validation_moves_the_aim_when_noise_is_over() -> None:
    model = tiny(dc.SpatialMasking())
    budget = dc.MacBudget(model, 0.4, total_steps=4, hold=True, schedule=GateSchedule(noise_until=0.4))
    for _ in range(2):
        budget.evaluated(0.9)
        with budget.observe() as cost:
            model(torch.randn(2, 3, 16, 16))
        budget.step()
    assert budget.hold.gap == 0
    budget.hold.mean, budget.hold.shift = 0.45, 0.0
    budget.evaluated(0.52)
    assert budget.hold.gap == pytest.approx(0.07) and float(budget._aims[0]) == pytest.approx(0.33)
    with budget.observe() as cost:
        model(torch.randn(2, 3, 16, 16))
    assert float(cost.terms.network.detach()) == pytest.approx((cost.ratio - 0.33) ** 2, rel=1e-4)
    dialled = dc.MacBudget(model, 0.4, total_steps=4, hold=True, dial=(0.2, 0.8), schedule=QUIET)
    dialled.steps_done, dialled.hold.mean = 3, 0.4
    dialled.evaluated(0.9)
    assert dialled.hold.gap == 0


def test_resuming_keeps_what_was_added_up() -> None:
    model = tiny(dc.SpatialMasking())
    budget = dc.MacBudget(model, 0.4, total_steps=10, hold=True, schedule=QUIET)
    for _ in range(3):
        with budget.observe():
            model(torch.randn(2, 3, 16, 16))
        budget.step()
    budget.evaluated(0.7)
    again = dc.MacBudget(model, 0.4, total_steps=10, hold=True, schedule=QUIET)
    again.load_state_dict(budget.state_dict())
    assert torch.equal(again._aims, budget._aims) and again.hold.state_dict() == budget.hold.state_dict()
    # A checkpoint of a training without it is where it starts from.
    plain = dc.MacBudget(model, 0.4, total_steps=10, schedule=QUIET)
    again.load_state_dict(plain.state_dict())
    assert again.steps_done == 0


def test_errors_stay_bounded() -> None:
    hold = Hold(total_steps=1)
    for _ in range(9):
        hold.saw(torch.tensor(1.0))
        hold.step(0.1)
    assert hold.aim(0.1) == pytest.approx(-0.4)
