"""Each gate against an independent formula of its paper."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tests.convert.networks import randomise_norms, small_block
from tests.gates.networks import gated, images

import dynaconv as dc
from dynaconv.nn import ChannelUnit, HaltingUnit, LayerUnit, RandomUnit, WidthUnit
from dynaconv.nn.halting import ponder_cost


def test_a_layer_unit_is_two_scores_of_the_average(seed: int) -> None:
    unit = LayerUnit(6, stride=2)
    x = torch.randn(9, 6, 5, 7)
    assert float(torch.sigmoid(unit.logits(x).detach()).mean()) == pytest.approx(0.87, abs=0.005)
    torch.nn.init.normal_(unit.scores.weight)
    unit(x), unit.eval()
    u = x.mean((2, 3))
    v = u @ unit.squeeze.weight.T + unit.squeeze.bias
    v = (v - unit.norm.running_mean) / (unit.norm.running_var + 1e-5).sqrt()
    closed, opened = (F.relu(v) @ unit.scores.weight.T + unit.scores.bias).unbind(1)
    unit.threshold.copy_((opened - closed).detach().sort().values[3:5].mean())
    want = (opened - closed >= unit.threshold).float()
    assert int(want.sum()) == 5
    assert torch.equal(unit(x), want.view(-1, 1, 1, 1).expand(9, 1, 3, 4))
    assert unit.macs((5, 7)) == 16 * 6 + 16 + 32 + 2


def test_a_layer_unit_passes_the_gradient_of_the_softmax(seed: int) -> None:
    """Straight-through of softmax((l + g) / tau) and of the sigmoid of the difference are the same."""
    unit, scores = LayerUnit(4, temperature=0.7), torch.randn(5, 2, requires_grad=True)
    gumbel = -torch.log(-torch.log(torch.rand(5, 2)))
    torch.softmax((scores + gumbel) / 0.7, 1)[:, 1].sum().backward()
    z = (scores[:, 1] - scores[:, 0]).detach().requires_grad_(True)
    unit.decide(z.view(5, 1, 1, 1), noise=(gumbel[:, 1] - gumbel[:, 0]).view(5, 1, 1, 1)).sum().backward()
    torch.testing.assert_close(z.grad, scores.grad[:, 1])


def test_one_decision_pays_for_the_whole_block() -> None:
    model = gated("layer").train()
    budget = dc.MacBudget(model, 0.5, total_steps=10, alpha=1.0)
    with dc.collect_masks(model, detach=False) as masks, budget.observe() as cost:
        model(images(8))
    costs = masks.costs()
    for name, mask in masks.items():
        decisions = mask[:, 0, 0, 0]
        assert torch.equal(costs[name].executed_macs, decisions.double() * costs[name].dense_macs)
        gradient = torch.autograd.grad(costs[name].executed_macs.sum(), masks[name], retain_graph=True)[0]
        assert torch.allclose(gradient.sum((1, 2, 3)), torch.tensor(float(costs[name].dense_macs)))
    assert float(cost.loss.detach()) >= 0


def reference_sact(model: torch.nn.Module, stage: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One image and position at a time: output of the stage and rho = N + R."""
    first, *units = model.get_submodule(stage)
    states, scores = [first(x)], []
    active = torch.ones_like(states[0][:, :1])
    for unit in units:
        gate, x_l = unit.gate, states[-1]
        if gate.conv is None:
            z = F.linear(gate.mean_norm(x_l.mean((2, 3))), gate.linear.weight, gate.linear.bias)[
                :, :, None, None
            ]
            z = z.expand_as(active)
        else:
            z = gate.conv(gate.norm(x_l))
            z = z + F.linear(gate.mean_norm(x_l.mean((2, 3))), gate.linear.weight)[:, :, None, None]
        scores.append(torch.sigmoid(z + gate.threshold))
        active = active * (sum(scores) < 0.99).float()
        states.append(unit.dense_forward(x_l, active))
    scores.append(torch.ones_like(scores[0]))
    output, rho = torch.zeros_like(states[0]), torch.zeros_like(active)
    n, _, h, w = output.shape
    for i, a, b in itertools.product(range(n), range(h), range(w)):
        total = 0.0
        for number, (state, score) in enumerate(zip(states, scores, strict=True), start=1):
            last = total + float(score[i, 0, a, b]) >= 0.99 or number == len(states)
            p = 1 - total if last else float(score[i, 0, a, b])
            output[i, :, a, b] += p * state[i, :, a, b]
            if last:
                rho[i, 0, a, b] = number + p
                break
            total += p
    return output, rho


@pytest.mark.parametrize("kind", ["sact", "act"])
@pytest.mark.parametrize("training", [True, False])
def test_halting_follows_the_definition(kind: str, training: bool) -> None:
    torch.manual_seed(0)
    model = randomise_norms(dc.create_model("resnet26_cifar", width=4, image_size=8))
    dc.dynamize_(model, dc.Halting(level="position" if kind == "sact" else "image"))
    for gate in dc.gates(model).values():
        torch.nn.init.normal_(gate.linear.weight)
        gate.threshold.fill_(3.5)
    for module in model.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.0
    model.train(training)
    x = torch.randn(2, 4, 5, 5)
    with torch.no_grad(), dc.collect_masks(model) as masks:
        got = model.layer1(x)
        units = ["layer1.1", "layer1.2", "layer1.3"]
        ponder = ponder_cost([masks.states[u][0] for u in units], [masks[u] for u in units])
        want, rho = reference_sact(model, "layer1", x)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ponder.as_subclass(torch.Tensor), rho, rtol=1e-4, atol=1e-5)
    ran = [masks[u].as_subclass(torch.Tensor) for u in units]
    assert all(bool((b <= a).all()) for a, b in itertools.pairwise(ran))
    assert 0 < float(sum(ran).mean()) < 3


def test_the_ponder_cost_has_gradient_minus_one_for_every_score_before_the_last() -> None:
    h = torch.tensor([[0.3, 0.5, 0.4]], requires_grad=True)
    total = h.cumsum(1).view(3, 1, 1, 1, 1)
    masks = (total < 0.99).float()
    rho = ponder_cost(list(total), list(masks))
    rho.sum().backward()
    assert float(rho.detach()) == pytest.approx(3 + (1 - 0.8)) and h.grad.tolist() == [[-1.0, -1.0, 0.0]]


def test_halting_starts_open_and_counts_where_it_scores() -> None:
    unit = HaltingUnit(4)
    active = torch.ones(2, 1, 5, 5)
    assert float(unit.score(torch.zeros(2, 4, 5, 5), active).detach().mean()) == pytest.approx(
        0.047, abs=0.02
    )
    active[0, :, :, 2:] = 0
    assert unit.spent_macs(torch.zeros(2, 4, 5, 5), active, active).tolist() == [4 + 37 * 10, 4 + 37 * 25]
    assert unit.macs((5, 5)) == 4 + 37 * 25 and HaltingUnit(4, level="image").macs((5, 5)) == 5


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("kind", ["basic", "basic_s2", "bottleneck_s2", "bottleneck_groups", "inverted"])
def test_channel_gates_equal_convolutions_of_zeroed_channels(kind: str) -> None:
    block = small_block(kind, dc.ChannelGate(groups=4)).eval()
    convs = block.convs
    x, groups = torch.randn(5, convs[0].in_channels, 9, 7), block.gate.groups
    mask = (torch.rand(5, groups, 1, 1) > 0.5).float()
    mask[0], mask[1] = 0, 1
    hidden = convs[0].out_channels
    keep = mask.repeat_interleave(hidden // groups, 1)
    y = x
    for i, step in enumerate(block.anatomy.steps):
        for path in (step.conv, step.norm, step.act):
            y = y if path is None else block.part(path)(y)
        y = y * keep if i < len(convs) - 1 else y
    shortcut = x if block.anatomy.shortcut is None else block.part(block.anatomy.shortcut)(x)
    want = shortcut + y
    want = want if block.anatomy.act is None else block.part(block.anatomy.act)(want)
    with torch.no_grad():
        torch.testing.assert_close(block.run(x, mask), want.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(block.dense_forward(x, mask), want.detach(), rtol=1e-4, atol=1e-5)
    assert groups == {"basic_s2": 2, "bottleneck_groups": 2}.get(kind, 4)


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("kind", ["basic", "bottleneck_s2", "bottleneck_groups", "inverted"])
def test_channel_costs_equal_a_count_of_what_is_left(kind: str) -> None:
    from dynaconv.cost import block_cost

    block = small_block(kind, dc.ChannelGate(groups=4))
    groups = block.gate.groups
    mask = torch.zeros(2, groups, 1, 1)
    mask[1, : max(1, groups // 2)] = 1
    cost = block_cost(block, mask, (8, 8))
    share = float(mask[1].mean())
    want = 0.0
    for i, conv in enumerate(block.convs):
        inner = i < len(block.convs) - 1
        factor = share if conv.groups > 1 else share ** (int(inner) + int(i > 0))
        want += factor * conv.weight.numel() * cost.convs[i].mask[0].numel()
    assert float(cost.executed_macs[1]) == pytest.approx(want)
    assert float(cost.executed_macs[0]) == 0.0


def test_channel_units_start_open_and_see_the_average(seed: int) -> None:
    unit = ChannelUnit(8, groups=4).eval()
    x = torch.randn(3, 8, 5, 5)
    want = (
        F.relu(x.mean((2, 3)) @ unit.squeeze.weight.T + unit.squeeze.bias) @ unit.scores.weight.T
        + unit.scores.bias
    )
    torch.testing.assert_close(unit.logits(x).flatten(1), want)
    assert unit.hidden == 16 and unit.macs((5, 5)) == 9 * 16 + 17 * 4
    assert ChannelUnit(8, groups=1024).hidden == 64


def test_random_units_draw_anew_in_training_and_repeat_in_evaluation(seed: int) -> None:
    unit = RandomUnit(seed=3)
    unit.noise.fill_(0.0)
    x = torch.randn(4, 8, 40, 40)
    with torch.no_grad():
        first, second = unit(x), unit(x)
    assert not torch.equal(first, second) and float(first.mean()) == pytest.approx(0.88, abs=0.02)
    unit.eval().requires_grad_(False)
    assert torch.equal(unit(x), unit(torch.zeros(4, 8, 40, 40))) and torch.equal(unit(x)[:1], unit(x)[1:2])
    assert float(unit(x).mean()) == pytest.approx(0.88, abs=0.03)
    other = RandomUnit(seed=4).eval().requires_grad_(False)
    assert not torch.equal(unit(x), other(x))
    field = unit.field((64, 64)).sigmoid().flatten()
    assert float(field.mean()) == pytest.approx(0.5, abs=0.02) and float(field.var()) == pytest.approx(
        1 / 12, abs=0.01
    )


@pytest.mark.parametrize(("keep", "phase"), [(1.0, 0.3), (0.5, 0.01), (0.25, 0.99)])
def test_width_units_keep_the_first_channels(keep: float, phase: float) -> None:
    unit = WidthUnit(8, keep=keep, phase=phase)
    want = [1.0] * int(8 * keep) + [0.0] * (8 - int(8 * keep))
    for training in (True, False):
        assert unit.train(training)(torch.zeros(1, 4, 3, 3)).flatten().tolist() == want


def test_narrow_blocks_keep_their_share() -> None:
    model = dc.create_model("resnet14_cifar")
    dc.dynamize_(model, dc.Narrow(budget=0.5))
    with torch.no_grad(), dc.collect_masks(model.eval()) as masks:
        model(torch.randn(1, 3, 32, 32))
    assert all(abs(float(c.executed_macs) / c.dense_macs - 0.5) < 0.04 for c in masks.costs().values())
