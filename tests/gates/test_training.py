"""Training with every gate type: copies, averages, half precision, compilers, resuming, several processes."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from tests.gates.networks import GATES, images
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.budget import GateSchedule, MacBudget
from dynaconv.models import BasicBlock

each_gate = pytest.mark.parametrize("kind", list(GATES))
LABELS = torch.tensor([0, 1, 2, 1])


class Tiny(nn.Module):
    """A stem, a stage of two blocks, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 2, 1)
        self.stage = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stage(F.relu(self.stem(x))).mean((2, 3)))


def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = Tiny()
    dc.dynamize_(model, GATES[kind], input_size=(3, 16, 16))
    return model.train()


def budget_of(model: nn.Module, **options) -> MacBudget:
    return MacBudget(model, 0.5, total_steps=8, ramp=0.25, ponder=0.01, hold=True, **options)


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, budget, optimizer, steps: range) -> list[float]:
    """Losses of some steps; each has images and noise of its own."""
    losses = []
    for step in steps:
        torch.manual_seed(step)
        with budget.observe() as cost:
            logits = model(images(4, step))
        loss = F.cross_entropy(logits, LABELS) + cost.loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        budget.step()
        losses.append(float(loss.detach()))
    return losses


@each_gate
def test_copies_go_their_own_way(kind: str) -> None:
    model = tiny(kind)
    budget = budget_of(model)
    with budget.observe():
        model(images(4))
    other = copy.deepcopy(model)
    own, others = budget, budget_of(other)
    first = train(model, own, optimizer_of(model), range(3))
    assert first == train(other, others, optimizer_of(other), range(3))
    assert not any(gate._forward_hooks for gate in dc.gates(model).values())


@each_gate
def test_moving_averages(kind: str) -> None:
    from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

    model = tiny(kind)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    budget, optimizer = budget_of(model), optimizer_of(model)
    for step in range(3):
        train(model, budget, optimizer, range(step, step + 1))
        average.update_parameters(model)
    averaged = average.module.eval()
    name, parameter = next(iter(model.named_parameters()))
    assert not torch.equal(parameter, dict(averaged.named_parameters())[name])
    profile = dc.profile(averaged, images(2))
    assert torch.isfinite(averaged(images(2))).all() and 0 <= profile.conditional_ratio <= 1
    assert dc.gates(averaged).keys() == dc.gates(model).keys()


@each_gate
def test_bfloat16(kind: str) -> None:
    model = tiny(kind)
    budget, optimizer = budget_of(model), optimizer_of(model)
    with torch.autocast("cpu", torch.bfloat16):
        with budget.observe() as cost, dc.collect_masks(model) as masks:
            logits = model(images(4))
        loss = F.cross_entropy(logits.float(), LABELS) + cost.loss
    assert logits.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    optimizer.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    decisions = list(masks.channels.values()) or list(masks.values())
    assert all(bool(((d == 0) | (d == 1)).all()) for d in decisions)
    missing = [n for n, p in model.named_parameters() if p.grad is None]
    assert missing == []


# torch's compiler makes an instance of every autograd function that it meets.
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"
)
@pytest.mark.parametrize("kind", [kind for kind in GATES if kind not in ("spatial_paper", "spatial_coarse")])
def test_a_compiled_step_is_the_eager_one_and_compiled_once(kind: str) -> None:
    model, other = tiny(kind), tiny(kind)
    budget = budget_of(model, schedule=GateSchedule(noise_until=0.4))
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")

    def step(x: Tensor, y: Tensor) -> Tensor:
        with budget.observe() as cost:
            logits = model(x)
        return F.cross_entropy(logits, y) + cost.loss

    optimizer, losses = optimizer_of(model), []
    with budget.attached():
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for i in range(4):
            torch.manual_seed(i)
            loss = compiled(images(4, i), LABELS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            budget.step()
            losses.append(float(loss.detach()))
    assert counter.frame_count == 1
    eager = budget_of(other, schedule=GateSchedule(noise_until=0.4))
    assert losses == pytest.approx(train(other, eager, optimizer_of(other), range(4)), rel=1e-4)
    assert not any(gate._forward_hooks for gate in dc.gates(model).values())


@each_gate
def test_resuming_in_the_middle_of_annealing(kind: str, tmp_path) -> None:
    schedule = GateSchedule(noise_until=0.7, temperature=((0, 2.0), (0.5, 1.0)))
    model = tiny(kind)
    budget, optimizer = budget_of(model, schedule=schedule), optimizer_of(model)
    train(model, budget, optimizer, range(3))
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "budget": budget.state_dict()}
    torch.save(state, tmp_path / "checkpoint.pt")
    want = train(model, budget, optimizer, range(3, 8))

    again = tiny(kind)
    budget, optimizer = budget_of(again, schedule=schedule), optimizer_of(again)
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    budget.load_state_dict(state["budget"])
    assert train(again, budget, optimizer, range(3, 8)) == want
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in again.state_dict().items())


RANKS = """
import json, os, sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
import dynaconv as dc
from tests.gates.networks import GATES, images
from tests.gates.test_training import LABELS, budget_of, optimizer_of, tiny

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, facts = dist.get_rank(), {}
for kind in GATES:
    model = tiny(kind)
    parallel, budget, optimizer = DistributedDataParallel(model), budget_of(model), optimizer_of(model)
    own = []
    for step in range(2):
        torch.manual_seed(2 * step + rank)
        with budget.observe() as cost, dc.collect_masks(model) as masks:
            logits = parallel(images(4, 2 * step + rank))
        optimizer.zero_grad()
        (F.cross_entropy(logits, LABELS) + cost.loss).backward()
        optimizer.step()
        budget.step()
        costs = masks.costs().values()
        own.append([float(sum(c.executed_macs.sum() for c in costs)), sum(4 * c.dense_macs for c in costs), cost.ratio])
    facts[kind] = {"own": own, "weights": float(sum(p.detach().double().abs().sum() for p in model.parameters()))}
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
    json.dump(facts, file)
dist.barrier()
dist.destroy_process_group()
"""


def test_two_ranks_share_one_budget(tmp_path) -> None:
    root = Path(__file__).resolve().parents[2]
    (tmp_path / "script.py").write_text(RANKS)
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, tmp_path / "script.py", tmp_path], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for kind in GATES:
        assert one[kind]["weights"] == two[kind]["weights"], kind
        for a, b in zip(one[kind]["own"], two[kind]["own"], strict=True):
            assert a[2] == b[2] == pytest.approx((a[0] + b[0]) / (a[1] + b[1])), kind


@pytest.mark.parametrize("kind", [k for k in GATES if k != "narrow"])
@pytest.mark.parametrize("where", ["images", "weights"])
def test_nan_in_masks_is_named_before_it_spoils_the_weights(kind: str, where: str) -> None:
    model, x = tiny(kind).train(), images(4)
    if where == "images":
        x[1, 2, 3, 4] = torch.nan
    else:
        broken = list(dc.gates(model).values())[-1]
        with torch.no_grad():
            next(p for p in broken.parameters()).fill_(torch.nan)
    if kind == "random" and where == "images":
        return  # It does not look at images: the loss tells.
    budget = dc.MacBudget(model, 0.5, total_steps=4, input_size=(3, 16, 16))
    with (
        pytest.raises(ValueError, match=r"the masks of stage\.\d.* hold NaN: the images or the weights"),
        budget.observe(),
    ):
        model(x)
    with budget.observe(check=False) as cost:
        model(x)
    assert not cost.ratio == cost.ratio
