"""dense, executed and routing multiply-adds, parameters: per layer, per image, in total."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.convert import dynamic_layers, masked_blocks
from dynaconv.cost.blocks import ConvCost
from dynaconv.cost.dense import DenseCounts, count_dense
from dynaconv.cost.masks import MaskCollection, collect_masks
from dynaconv.nn.dynamic_conv import KernelMacs


@dataclass(frozen=True)
class LayerProfile:
    """One layer: dense multiply-adds of one image, executed ones as a mean over the images, parameters.

    role: "fixed" (always computed), "conditional" (computed where a mask is open) or "routing" (a gate or a router).
    mixing_macs and routing_macs: of a layer with a kernel per sample, both included in executed_macs.
    """

    name: str
    type: str
    role: str
    dense_macs: int
    executed_macs: float
    density: float
    params: int
    mixing_macs: int = 0
    routing_macs: int = 0


@dataclass
class Profile:
    """Four numbers that must not be confused; milliseconds are measured elsewhere (`dynaconv bench`).

    * dense_macs: one image through the static network, without gates;
    * executed_macs [N]: every multiply-add done for each image, gates, routers and mixing included;
    * routing_macs [N]: the part of it that decides: gates and routers;
    * mixing_macs [N]: the part of it that builds kernels (zero without dynamic kernels).

    conditional_macs is the part of dense_macs that masks can skip, conditional_ratio the executed share of it.
    Linear layers are in `linear_macs`, and in the totals where `counts_linear` is true.
    """

    dense_macs: int
    executed_macs: Tensor
    routing_macs: Tensor
    mixing_macs: Tensor
    conditional_macs: int
    conditional_ratio: float
    linear_macs: int
    params: int
    input_size: tuple[int, int, int]
    counts_linear: bool = False
    layers: list[LayerProfile] = field(default_factory=list)

    @property
    def macs_ratio(self) -> float:
        """Mean executed multiply-adds over dense ones, whole network."""
        return float(self.executed_macs.mean()) / self.dense_macs if self.dense_macs else 0.0

    def table(self) -> str:
        """Readable table, one line a layer, totals below."""
        rows = [
            (
                y.name,
                y.type,
                y.role,
                f"{y.dense_macs:,}",
                f"{y.executed_macs:,.0f}",
                f"{y.density:.3f}",
                f"{y.params:,}",
            )
            for y in self.layers
        ]
        header = ("layer", "type", "role", "dense MACs", "executed MACs", "density", "parameters")
        return f"{format_table(header, rows, 'lllrrrr')}\n{self.summary()}"

    def summary(self) -> str:
        """Totals, a line each."""
        n, size = len(self.executed_macs), "x".join(str(v) for v in self.input_size)
        lines = [
            f"dense     {self.dense_macs:>15,} MACs per image of {size}",
            f"executed  {self.executed_macs.mean():>15,.0f} MACs per image "
            f"(mean of {n}, from {self.executed_macs.min():,.0f} "
            f"to {self.executed_macs.max():,.0f}), {self.macs_ratio:.3f} of dense",
            f"routing   {self.routing_macs.mean():>15,.0f} of them decide",
        ]
        if self.mixing_macs.any():
            lines.append(f"mixing    {self.mixing_macs.mean():>15,.0f} of them build kernels")
        if self.conditional_macs:
            lines[2] += (
                f"; conditional MACs: {self.conditional_ratio:.3f} of {self.conditional_macs:,} executed"
            )
        lines[-1] += f"; {self.params:,} parameters"
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        plain = {k: v for k, v in self.__dict__.items() if k not in ("layers",)}
        plain = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in plain.items()}
        return {**plain, "macs_ratio": self.macs_ratio, "layers": [y.__dict__ for y in self.layers]}

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    def __str__(self) -> str:
        return self.table()


def profile(model: nn.Module, x: Tensor, *, include_linear: bool | None = None) -> Profile:
    """Count multiply-adds for the images x, from the masks that the network decides in evaluation mode.

    Args:
        model: any network; masks are used where it has gates. It is left as it was.
        x: [N, C, H, W], N >= 1.
        include_linear: True is the convention of the dynamic-kernel papers: convolutions and linear layers count,
            biases do not. False is that of DynConv: convolutions and their biases count, linear layers do not
            (`linear_macs` says what was left out). None takes True for a network with dynamic kernels, whose routers
            are linear layers, and False for any other.
    Returns:
        Profile.
    Raises:
        ValueError: x is not [N, C, H, W] or has no image.
    Source: counting rules of arXiv 1912.03203 (released code) and docs/kernels.md; FLOPs = 2 x MACs.
    """
    _checks.images(x, None, "profile")
    if x.shape[0] == 0:
        raise ValueError("profile expects at least one image, got a batch of size 0")
    size = (x.shape[1], x.shape[2], x.shape[3])
    if include_linear is None:
        include_linear = bool(dynamic_layers(model))
    counts = count_dense(model, size, biases=not include_linear)
    masks = _evaluate(model, x) if masked_blocks(model) else MaskCollection({})
    return _assemble(model, counts, masks, x.shape[0], size, include_linear)


def _evaluate(model: nn.Module, x: Tensor) -> MaskCollection:
    modes = {m: m.training for m in model.modules()}
    try:
        model.eval()
        with torch.no_grad(), collect_masks(model) as masks:
            model(x)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return masks


def _assemble(
    model: nn.Module, counts: DenseCounts, masks: MaskCollection, n: int, size, include_linear
) -> Profile:
    costs: dict[str, list[ConvCost]] = {}
    for name, cost in masks.costs().items():
        for conv in cost.convs:
            costs.setdefault(f"{name}.{conv.name}", []).append(conv)
    named = counts.convs if not include_linear else {**counts.convs, **counts.linears}
    modules = dict(model.named_modules())
    layers: list[LayerProfile] = []
    executed, routing, mixing = (torch.zeros(n, dtype=torch.float64) for _ in range(3))
    static = {k: v.static if include_linear or k in counts.convs else 0 for k, v in counts.kernels.items()}
    named = {**named, **counts.routers, **static}
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for name, macs in sorted(named.items(), key=lambda item: order.get(item[0], len(order))):
        spent = torch.full((n,), float(macs), dtype=torch.float64)
        role = (
            "routing"
            if counts.is_gate(name) or name in counts.routers
            else "conditional"
            if name in costs
            else "fixed"
        )
        if role == "conditional":
            # By the convention of the dense count, in which a bias counts or does not.
            positions = sum(conv.mask[0].numel() for conv in costs[name])
            opened = [conv.mask.sum((1, 2, 3), dtype=torch.float64).cpu() for conv in costs[name]]
            spent = torch.stack(opened).sum(0) * (macs / positions)
        if role == "routing":
            own_cost = masks.routing.get(name.removesuffix(".gate"))
            spent = spent if own_cost is None else own_cost.cpu()
            routing += spent
        density = float(spent.mean()) / macs if macs else 0.0
        kernel = counts.kernels.get(name, KernelMacs(0, 0, 0))
        spent = spent + kernel.mixing + kernel.routing
        mixing += kernel.mixing
        routing += kernel.routing
        executed += spent
        module = modules.get(name, model)
        own = sum(p.numel() for p in module.parameters(recurse=False))
        layers.append(
            LayerProfile(
                name,
                type(module).__name__,
                role,
                macs,
                float(spent.mean()),
                density,
                own,
                kernel.mixing,
                kernel.routing,
            )  # fmt: skip
        )
    conditional = [y for y in layers if y.role == "conditional"]
    dense_conditional = sum(y.dense_macs for y in conditional)
    ratio = sum(y.density * y.dense_macs for y in conditional) / dense_conditional if conditional else 1.0
    return Profile(
        dense_macs=counts.static + (sum(counts.linears.values()) if include_linear else 0),
        executed_macs=executed,
        routing_macs=routing,
        mixing_macs=mixing,
        conditional_macs=dense_conditional,
        conditional_ratio=ratio,
        linear_macs=sum(counts.linears.values()),
        params=sum(p.numel() for p in model.parameters()),
        input_size=size,
        counts_linear=include_linear,
        layers=layers,
    )
