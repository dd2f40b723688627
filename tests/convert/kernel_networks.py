"""What tests of dynamic kernels in whole networks share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import KernelConfig

CONFIGS: dict[str, KernelConfig] = {
    "condconv": dc.CondConv(num_experts=2),
    "dyconv": dc.DYConv(num_kernels=2),
    "dynet": dc.DyNetConv(group_size=2),
    "dcd": dc.DCDConv(),
    "odconv": dc.ODConv(num_kernels=2),
    "weightnet": dc.WeightNetConv(),
}


def images(size: int = 32, batch: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    assert got.shape == want.shape
    error = (got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-12)
    assert float(error) <= tolerance, f"relative deviation {float(error):.2e} > {tolerance:.0e}"


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return list(now) == list(state) and all(torch.equal(now[k], state[k]) for k in state)


def rules_of(model: nn.Module) -> dict[str, str]:
    return {name: type(layer).__name__ for name, layer in dc.dynamic_layers(model).items()}
