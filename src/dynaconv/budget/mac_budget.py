"""Training under a budget of multiply-adds, in any training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.budget.losses import BudgetLoss, budget_loss
from dynaconv.budget.schedules import GateSchedule
from dynaconv.convert import gates, masked_blocks
from dynaconv.cost.dense import count_dense, guess_input_size
from dynaconv.cost.masks import MaskCollection, collect_masks

SCOPES = ("conditional", "total")


@dataclass
class ObservedCost:
    """What a forward pass inside `MacBudget.observe()` cost; filled when the `with` block ends.

    loss: alpha * (L_net + L_block), to be added to the task loss.
    ratio: executed share of the conditional multiply-adds over the batch of all ranks, 0..1.
    densities: executed share of each block; executed_macs / dense_macs: conditional, summed over the batch.
    """

    loss: Tensor | float = 0.0
    ratio: float = 1.0
    densities: dict[str, float] = field(default_factory=dict)
    executed_macs: float = 0.0
    dense_macs: float = 0.0
    terms: BudgetLoss | None = None


class MacBudget:
    """Keeps a network's executed multiply-adds near a target while it trains.

    Args:
        model: a dynamic network.
        target: share of the conditional multiply-adds to execute, in (0, 1].
        total_steps: training steps in all; the schedules are stretched over them.
        alpha: weight of the budget loss (10 in the paper's classification networks, 0.01 for pose).
        anneal: share of training over which the block bounds open (0.33 in the paper).
        ramp: share of training over which the target falls from 1 to `target` (0 in the paper: at once). Starting from
            a trained dense network, a ramp gives the gates time to learn where before most positions close.
        schedule: noise and temperature of the gates.
        scope: "conditional" (the paper's), or "total": target is a share of the whole static network's multiply-adds,
            gates included in what is spent; needs input_size or a model that knows its own.
    Raises:
        ValueError: target outside (0, 1], no gates, a total target below what is always computed.
    Source: arXiv 1912.03203, section 3.4.

    >>> import dynaconv as dc
    >>> model = dc.create_model("dynconv_resnet8_cifar")
    >>> budget = MacBudget(model, target=0.5, total_steps=100)
    >>> with budget.observe() as cost: logits = model(torch.randn(2, 3, 32, 32))
    >>> (logits.sum() + cost.loss).backward(); budget.step()
    """

    def __init__(
        self,
        model: nn.Module,
        target: float = 0.5,
        *,
        total_steps: int,
        alpha: float = 10.0,
        anneal: float = 0.33,
        ramp: float = 0.0,
        schedule: GateSchedule | None = None,
        scope: str = "conditional",
        input_size: tuple[int, int, int] | None = None,
    ) -> None:
        self.target = _checks.fraction("target", target)
        _checks.one_of("scope", scope, SCOPES)
        _checks.positive("total_steps", total_steps)
        _checks.fraction("anneal", anneal)
        if not gates(model):
            raise _checks.no_gates("MacBudget")
        self.model, self.alpha, self.anneal = model, float(alpha), float(anneal)
        if not 0 <= ramp < 1:
            raise ValueError(
                f"ramp must lie in [0, 1), got {ramp!r}; 0.3 lowers the target over the first 30 % of training"
            )
        self.ramp = float(ramp)
        self.total_steps, self.steps_done = int(total_steps), 0
        self.schedule = schedule or GateSchedule()
        self.scope = scope
        self.conditional_target = (
            self.target if scope == "conditional" else self._conditional_share(input_size)
        )
        self.schedule.apply_(model, 0.0)

    @property
    def progress(self) -> float:
        """Share of training done, 0..1."""
        return min(1.0, self.steps_done / self.total_steps)

    @property
    def current_target(self) -> float:
        """Conditional target of this step: `target`, or on the way to it while the ramp lasts."""
        share = min(1.0, self.progress / self.ramp) if self.ramp else 1.0
        return 1.0 - share * (1.0 - self.conditional_target)

    @contextmanager
    def observe(self) -> Iterator[ObservedCost]:
        """Collect the masks of one forward pass; the cost is known when the block ends.

        Under torch.distributed the counts of all ranks are summed before any ratio is formed.
        """
        cost = ObservedCost()
        with collect_masks(self.model, detach=False) as masks:
            yield cost
        if masks:
            self._fill(cost, masks)

    def step(self) -> None:
        """Advance noise, temperature and bounds by one training step; call it after the optimizer's step."""
        self.steps_done += 1
        self.schedule.apply_(self.model, self.progress)

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        gate_lr_multiplier: float = 1.0,
        gate_weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Optimizer parameter groups: the network's own parameters and the gates' apart."""
        of_gates = {id(p) for gate in gates(self.model).values() for p in gate.parameters()}
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        return [
            {
                "params": [p for p in trainable if id(p) not in of_gates],
                "lr": lr,
                "weight_decay": weight_decay,
            },
            {
                "params": [p for p in trainable if id(p) in of_gates],
                "lr": lr * gate_lr_multiplier,
                "weight_decay": weight_decay if gate_weight_decay is None else gate_weight_decay,
            },
        ]

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the gates' own state is in the model."""
        return {"steps_done": self.steps_done, "total_steps": self.total_steps, "target": self.target}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.steps_done = int(state["steps_done"])
        self.schedule.apply_(self.model, self.progress)

    def _fill(self, cost: ObservedCost, masks: MaskCollection) -> None:
        costs = masks.costs()
        images = len(next(iter(masks.values())))
        executed = torch.stack([c.executed_macs.sum() for c in costs.values()])
        dense = executed.new_tensor([float(c.dense_macs * images) for c in costs.values()])
        executed, dense = _sum_over_ranks(executed), _sum_over_ranks(dense)
        terms = budget_loss(executed, dense, self.current_target, self.progress / self.anneal)
        cost.terms = terms
        cost.loss = (self.alpha * terms.total).float()
        cost.ratio = float(terms.ratio.detach())
        cost.densities = dict(zip(costs, terms.block_ratios.detach().tolist(), strict=True))
        cost.executed_macs, cost.dense_macs = float(executed.detach().sum()), float(dense.sum())

    def _conditional_share(self, input_size: tuple[int, int, int] | None) -> float:
        counts = count_dense(self.model, input_size or guess_input_size(self.model))
        steps = [
            f"{name}.{path}" for name, block in masked_blocks(self.model).items() for path in block.conv_paths
        ]
        conditional = sum(counts.convs[name] for name in steps)
        fixed = counts.static - conditional + counts.gates + counts.kernel_extra
        share = (self.target * counts.static - fixed) / conditional
        if not 0 < share <= 1:
            floor = fixed / counts.static
            raise ValueError(
                f"a total target of {self.target:g} cannot be met: {floor:.3f} of the static network's MACs are always "
                f"computed (stem, shortcuts, gates, routers, mixing); choose a target in ({floor:.3f}, 1]"
            )
        return share


def _sum_over_ranks(values: Tensor) -> Tensor:
    """Sum over all ranks, with gradient: the loss is not linear in the counts, so they are summed first."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return values
    if not values.requires_grad:
        values = values.clone()
        dist.all_reduce(values)
        return values
    return _AllReduceSum.apply(values)


class _AllReduceSum(torch.autograd.Function):
    """Sum over ranks; every rank computes the same loss, so the gradients are summed too and DDP averages them."""

    @staticmethod
    def forward(ctx, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad)
        return grad
