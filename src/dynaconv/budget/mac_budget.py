"""Training under a budget of multiply-adds, in any training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.budget.hold import Hold
from dynaconv.budget.losses import KINDS, BudgetLoss, limits, loss_terms
from dynaconv.budget.schedules import GateSchedule
from dynaconv.convert import gates, masked_blocks
from dynaconv.cost.dense import count_dense, guess_input_size
from dynaconv.cost.masks import MaskCollection, MaskHooks
from dynaconv.nn.masked_block import MaskedBlock

SCOPES = ("conditional", "total")
# Multiples of it fill the unit interval evenly.
_GOLDEN = (5**0.5 - 1) / 2


class ObservedCost:
    """What a forward pass inside `MacBudget.observe()` cost; filled when the `with` block ends.

    loss: to be added to the task loss. terms: what it was made of. ponder: mean ponder cost, summed over stages, where
    there are halting units. The numbers below are read from tensors when they are asked for.
    """

    def __init__(self) -> None:
        self.loss: Tensor | float = 0.0
        self.terms: BudgetLoss | None = None
        self.ponder: Tensor | None = None
        self.names: list[str] = []

    @property
    def ratio(self) -> float:
        """Executed share of the conditional multiply-adds over the batch of all ranks, 0..1."""
        return 1.0 if self.terms is None else float(self.terms.ratio.detach())

    @property
    def densities(self) -> dict[str, float]:
        """Executed share of each block."""
        shares = [] if self.terms is None else self.terms.block_ratios.detach().tolist()
        return dict(zip(self.names, shares, strict=True))

    @property
    def executed_macs(self) -> float:
        """Conditional multiply-adds executed, summed over the batch of all ranks."""
        return 0.0 if self.terms is None else float(self.terms.executed_macs.detach().sum())

    @property
    def dense_macs(self) -> float:
        """The same with every position open."""
        return 0.0 if self.terms is None else float(self.terms.dense_macs.sum())


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
        loss: "network" (DynConv's: the network meets the target, blocks are bounded at first) or "blocks"
            (ConvNet-AIG's: every block meets it).
        ponder: weight of the ponder cost of halting units (arXiv 1612.02297, equation 4), 0.01 on CIFAR-10; the paper's
            training is that alone, alpha=0.
        dial: (low, high): every step aims at another budget in this range, with thresholds shifted accordingly, so that
            one network learns them all; `target` is then the one to validate at.
        hold: after the ramp, add up what the target is missed by and aim as much lower (or higher), so that training
            itself ends at the budget, and calibration has little to take away from what was learned.
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
        loss: str = "network",
        ponder: float = 0.0,
        dial: tuple[float, float] | None = None,
        hold: bool = False,
    ) -> None:
        self.target = _checks.fraction("target", target)
        _checks.one_of("scope", scope, SCOPES)
        _checks.one_of("budget loss", loss, KINDS)
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
        self.scope, self.loss, self.ponder = scope, loss, float(ponder)
        self._share = Share.of(model, input_size) if scope == "total" else Share()
        self.conditional_target = self._share.conditional(self.target)
        self.dial = None if dial is None else _checks.dial_range(dial)
        for end in self.dial or ():
            self._share.conditional(end)
        self.hold = Hold(self.total_steps) if hold else None
        self._hooks: MaskHooks | None = None
        # Target, upper and lower bound of this step.
        self._aims = torch.zeros(3, dtype=torch.float64)
        self._apply()

    @property
    def progress(self) -> float:
        """Share of training done, 0..1."""
        return min(1.0, self.steps_done / self.total_steps)

    @property
    def sampled_target(self) -> float:
        """The budget that this step aims at: `target`, or with a dial one that walks evenly through its range.

        The walk is the same on every rank and needs no state but the number of steps.
        """
        if self.dial is None:
            return self.target
        low, high = self.dial
        return low + (high - low) * ((0.5 + self.steps_done * _GOLDEN) % 1.0)

    @property
    def current_target(self) -> float:
        """Conditional target of this step: the sampled one, or on the way to it while the ramp lasts."""
        share = min(1.0, self.progress / self.ramp) if self.ramp else 1.0
        return 1.0 - share * (1.0 - self._share.conditional(self.sampled_target))

    @contextmanager
    def observe(self, *, check: bool = True) -> Iterator[ObservedCost]:
        """Collect the masks of one forward pass; the cost is known when the block ends.

        Under torch.distributed the counts of all ranks are summed before any ratio is formed.

        Args:
            check: raise where masks hold NaN, before the gradients of a finite-looking loss can spoil the weights. Only
                on the CPU, where nobody has to wait for the value, and not while compiling; elsewhere the loss is NaN.
        Raises:
            ValueError: masks hold NaN, with the blocks.
        """
        cost = ObservedCost()
        hooks = self._hooks or MaskHooks(self.model, detach=False)
        masks = hooks.collect()
        try:
            yield cost
        finally:
            hooks.stop()
            if self._hooks is None:
                hooks.remove()
        if masks:
            self._fill(cost, masks)
            if check and not torch.compiler.is_compiling():
                _refuse_nan(cost)

    @contextmanager
    def attached(self) -> Iterator[MacBudget]:
        """Leave the hooks on the gates, so that a step with `observe` in it can be compiled as a whole.

        >>> import dynaconv as dc
        >>> model = dc.create_model("dynconv_resnet8_cifar")
        >>> budget = MacBudget(model, 0.5, total_steps=10)
        >>> def step(x, y):
        ...     with budget.observe() as cost: logits = model(x)
        ...     return torch.nn.functional.cross_entropy(logits, y) + cost.loss
        >>> with budget.attached(): compiled = torch.compile(step, fullgraph=True)  # and the training loop
        """
        self._hooks = MaskHooks(self.model, detach=False)
        try:
            yield self
        finally:
            self._hooks.remove()
            self._hooks = None

    def step(self) -> None:
        """Advance noise, temperature and bounds by one training step; call it after the optimizer's step."""
        if self.hold is not None and self.progress >= self.ramp:
            self.hold.step(self.current_target)
        self.steps_done += 1
        self._apply()

    def evaluated(self, ratio: float) -> None:
        """Tell what a validation executed of the conditional multiply-adds; `hold` then aims at that.

        Pictures are augmented in training, and gates are noisy until late. Until the noise ends, and with a dial,
        which is validated at one budget only, nothing changes.
        """
        if self.hold is not None and self.dial is None and self.progress > self.schedule.noise_until:
            self.hold.evaluated(ratio)
            self._apply()

    @contextmanager
    def at_target(self) -> Iterator[None]:
        """Set a dial to `target` inside the `with` block, for validation."""
        self.turn_()
        try:
            yield
        finally:
            self.turn_(self.sampled_target)

    def _apply(self) -> None:
        self.schedule.apply_(self.model, self.progress)
        target = self.current_target
        aim = target if self.hold is None else self.hold.aim(target)
        own = aim if self.loss == "blocks" else target
        aims = aim, *limits(own, self.progress / self.anneal, self.loss)
        self._aims.copy_(torch.tensor(aims, dtype=torch.float64))
        self.turn_(self.sampled_target)

    def turn_(self, target: float | None = None) -> None:
        """With a dial, shift all logits so that a gate without opinion opens with the budget's probability.

        Args:
            target: None takes `target`, the budget to validate at.
        """
        if self.dial is None:
            return
        share = self._share.conditional(self.target if target is None else target)
        share = min(max(share, 0.01), 0.99)
        for gate in gates(self.model).values():
            gate.threshold.fill_(math.log((1 - share) / share))

    def param_groups(
        self,
        lr: float,
        weight_decay: float = 0.0,
        *,
        gate_lr_multiplier: float = 1.0,
        gate_weight_decay: float | None = None,
    ) -> list[dict[str, Any]]:
        """Optimizer parameter groups: the network's own parameters and the gates' apart.

        Args:
            gate_weight_decay: None takes the presets': weight_decay for gates of preset "paper", 0 for all others,
                since decay pulls logits towards their threshold. Where a network has both, there are three groups.
        """
        decays = {
            id(p): self._gate_decay(block, weight_decay) if gate_weight_decay is None else gate_weight_decay
            for block in masked_blocks(self.model).values()
            for p in block.gate.parameters()
        }
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        own = [p for p in trainable if id(p) not in decays]
        groups = [{"params": own, "lr": lr, "weight_decay": weight_decay}]
        for decay in sorted(set(decays.values())) or [0.0]:
            params = [p for p in trainable if decays.get(id(p)) == decay]
            groups.append({"params": params, "lr": lr * gate_lr_multiplier, "weight_decay": decay})
        return groups

    @staticmethod
    def _gate_decay(block: MaskedBlock, weight_decay: float) -> float:
        return weight_decay if getattr(block.config, "preset", None) == "paper" else 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; the gates' own state is in the model."""
        state = {"steps_done": self.steps_done, "total_steps": self.total_steps, "target": self.target}
        return state if self.hold is None else {**state, "hold": self.hold.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self.steps_done = int(state["steps_done"])
        if self.hold is not None and "hold" in state:
            self.hold.load_state_dict(state["hold"])
        self._apply()

    def _fill(self, cost: ObservedCost, masks: MaskCollection) -> None:
        costs = masks.costs()
        images = len(next(iter(masks.values())))
        executed = torch.stack([c.executed_macs.sum() for c in costs.values()])
        dense = executed.new_tensor([float(c.dense_macs * images) for c in costs.values()])
        executed, dense = _sum_over_ranks(executed), _sum_over_ranks(dense)
        terms = loss_terms(executed, dense, *self._aims.to(executed).unbind(), self.loss)
        cost.terms, cost.names = terms, list(costs)
        if self.hold is not None:
            self.hold.saw(terms.ratio)
        cost.loss = (self.alpha * terms.total).float()
        stages = list(masks.ponder_costs().values())
        if stages:
            cost.ponder = torch.stack([rho.mean() for rho in stages]).sum()
            cost.loss = cost.loss + self.ponder * cost.ponder.float()


def _refuse_nan(cost: ObservedCost) -> None:
    ratio = cost.terms.ratio.detach()
    if ratio.device.type == "cpu" and math.isnan(float(ratio)):
        raise _checks.budget_nan([name for name, share in cost.densities.items() if math.isnan(share)])


@dataclass(frozen=True)
class Share:
    """From a share of the whole network's multiply-adds to one of the conditional ones; as it is by default."""

    static: int = 1
    fixed: int = 0
    possible: int = 1

    @classmethod
    def of(cls, model: nn.Module, input_size: tuple[int, int, int] | None) -> Share:
        """What a network always computes, and what its gates decide about."""
        counts = count_dense(model, input_size or guess_input_size(model))
        steps = [
            f"{name}.{path}" for name, block in masked_blocks(model).items() for path in block.conv_paths
        ]
        conditional = sum(counts.convs[name] for name in steps)
        fixed = counts.static - conditional + counts.gates + counts.kernel_extra
        return cls(counts.static, fixed, conditional)

    def conditional(self, target: float) -> float:
        """The conditional share at which the whole network meets `target`.

        Raises:
            ValueError: what is always computed exceeds the target.
        """
        share = (target * self.static - self.fixed) / self.possible
        if not 0 < share <= 1:
            raise _checks.total_below_floor(target, self.fixed / self.static)
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
