"""The paper's loss over a whole training, the other losses, and the dial, against formulas of their own."""

from __future__ import annotations

import math

import pytest
import torch
from tests.gates.networks import gated, images
from tests.gates.test_training import budget_of, tiny

import dynaconv as dc
from dynaconv.budget import MacBudget
from dynaconv.testing import force_masks


def hand_count(model: torch.nn.Module, masks) -> tuple[list[float], list[float]]:
    """Executed and possible multiply-adds of each basic block, by looking at every position's readers."""
    executed, possible = [], []
    for name, mask in masks.items():
        block = dc.masked_blocks(model)[name].block
        c, o = block.conv1.in_channels, block.conv1.out_channels
        m = torch.nn.functional.pad(mask.as_subclass(torch.Tensor), (1, 1, 1, 1))
        h, w = mask.shape[2:]
        near = torch.stack([m[:, :, i : i + h, j : j + w] for i in range(3) for j in range(3)]).amax(0)
        executed.append(float(near.sum()) * 9 * c * o + float(mask.sum()) * 9 * o * o)
        possible.append(mask.numel() * 9 * o * (c + o))
    return executed, possible


@pytest.mark.parametrize("target", [0.3, 0.7])
def test_the_papers_loss_over_the_whole_annealing_schedule(target: float) -> None:
    epochs, steps = 10, 3
    model = dc.create_model("resnet14_cifar", width=4, image_size=16)
    dc.dynamize_(model, dc.SpatialMasking(preset="paper"))
    budget = MacBudget(model.train(), target, total_steps=epochs * steps)
    seen = []
    for step in range(epochs * steps):
        with force_masks(model, 0.2 + 0.6 * (step % 4) / 3, seed=step):
            with budget.observe() as cost, dc.collect_masks(model) as masks:
                model(images(2))
        executed, possible = hand_count(model, masks)
        e = step / steps
        p = min(1.0, e / (0.33 * epochs))
        q = math.cos(p * math.pi / 2) ** 2
        upper, lower = 1 - q * (1 - target), q * target
        shares = [c / t for c, t in zip(executed, possible, strict=True)]
        net = (sum(executed) / sum(possible) - target) ** 2
        blocks = sum(max(0, r - upper) ** 2 + max(0, lower - r) ** 2 for r in shares) / len(shares)
        assert float(cost.loss) == pytest.approx(10 * (net + blocks), rel=1e-5, abs=1e-9)
        assert (cost.ratio, list(cost.densities.values())) == (
            pytest.approx(sum(executed) / sum(possible)),
            pytest.approx(shares),
        )
        assert (cost.executed_macs, cost.dense_macs) == (pytest.approx(sum(executed)), sum(possible))
        seen.append((upper, lower))
        assert all(float(g.noise) == float(step / (epochs * steps) <= 0.8) for g in dc.gates(model).values())
        budget.step()
    assert seen[0] == (pytest.approx(target), target) and seen[-1] == (1.0, pytest.approx(0.0, abs=1e-12))


def test_the_paper_lets_no_gradient_through_dilation_and_the_default_does() -> None:
    for preset, shares in (("paper", 1), ("default", 2)):
        model = dc.create_model("resnet8_cifar", width=4, image_size=8)
        dc.dynamize_(model, dc.SpatialMasking(preset=preset))
        with dc.collect_masks(model.train(), detach=False) as masks:
            model(images(2, size=8))
        for cost in masks.costs().values():
            assert sum(conv.mask.requires_grad for conv in cost.convs) == shares


def test_each_block_meets_the_target_in_layer_gates_own_loss() -> None:
    model = gated("layer").train()
    budget = MacBudget(model, 0.6, total_steps=10, alpha=2.0, loss="blocks")
    with budget.observe() as cost, dc.collect_masks(model) as masks:
        model(images(8))
    opened = [float(mask[:, 0, 0, 0].mean()) for mask in masks.values()]
    want = 2.0 * sum((0.6 - a) ** 2 for a in opened) / len(opened)
    assert float(cost.loss.detach()) == pytest.approx(want, rel=1e-5)


def test_the_ponder_cost_is_summed_over_stages() -> None:
    model = gated("sact").train()
    budget = MacBudget(model, 0.5, total_steps=10, alpha=0.0, ponder=0.01)
    with budget.observe() as cost, dc.collect_masks(model) as masks:
        model(images(8))
    stages = masks.ponder_costs()
    assert list(stages) == ["layer1.1", "layer2.1", "layer3.1"]
    assert all(1 <= float(rho.min()) and float(rho.max()) <= 3 for rho in stages.values())
    want = 0.01 * sum(float(rho.mean()) for rho in stages.values())
    assert float(cost.loss.detach()) == pytest.approx(want, rel=1e-5)
    cost.loss.backward()
    assert all(float(g.linear.weight.grad.abs().sum()) > 0 for g in dc.gates(model).values())


def test_a_dial_walks_evenly_and_turns_the_thresholds() -> None:
    model = tiny("spatial")
    budget = MacBudget(model, 0.4, total_steps=50, dial=(0.2, 0.8))
    seen = []
    for _ in range(50):
        target = budget.sampled_target
        assert budget.current_target == pytest.approx(target)
        assert all(
            float(torch.sigmoid(-gate.threshold)) == pytest.approx(target, abs=1e-5)
            for gate in dc.gates(model).values()
        )
        seen.append(target)
        budget.step()
    assert 0.2 <= min(seen) < 0.22 and 0.78 < max(seen) <= 0.8
    counts = torch.histc(torch.tensor(seen), 6, 0.2, 0.8).tolist()
    assert max(counts) - min(counts) <= 2
    with budget.at_target():
        assert all(
            float(torch.sigmoid(-g.threshold)) == pytest.approx(0.4, abs=1e-5)
            for g in dc.gates(model).values()
        )
    assert budget.sampled_target == pytest.approx(
        float(torch.sigmoid(-next(iter(dc.gates(model).values())).threshold)), abs=1e-5
    )


def test_a_dial_without_opinion_executes_the_budget() -> None:
    """A gate with logits of 0 opens with the budget's probability, which is what the loss then corrects."""
    model = tiny("random")
    for gate in dc.gates(model).values():
        gate.logit.data.zero_()
    budget = budget_of(model, dial=(0.2, 0.8))
    budget.turn_(0.35)
    with torch.no_grad(), dc.collect_masks(model) as masks:
        model(images(64))
    assert all(abs(mask.density - 0.35) < 0.03 for mask in masks.values())


@pytest.mark.parametrize("dial", [(0.8, 0.2), (0.5, 0.5), (0.0, 0.5), (0.2,), 0.5, (0.2, 1.1)])
def test_bad_dials(dial) -> None:
    with pytest.raises(ValueError, match="dial must be two budgets"):
        MacBudget(tiny("spatial"), 0.5, total_steps=1, dial=dial)


def test_other_bad_options() -> None:
    with pytest.raises(ValueError, match="unknown budget loss 'block'; did you mean 'blocks'"):
        MacBudget(tiny("spatial"), 0.5, total_steps=1, loss="block")
