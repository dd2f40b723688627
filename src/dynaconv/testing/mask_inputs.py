"""A network whose masks are inputs: forced masks for what leaves Python, where hooks do not reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.testing.masks import forced_masks


class MaskInputs(nn.Module):
    """`forward(x, *masks)`: the network with every gate's decision replaced by a mask that is given.

    The gates still compute, so that a time measured with forced masks pays for them. Export it with
    `(x, *masks)` as example; `forced` makes the masks that `force_masks` would force.

    Args:
        model: a dynamic network in evaluation mode; it is used as it is, and each gate gets a hook.

    >>> import dynaconv as dc
    >>> x, model = torch.randn(2, 3, 32, 32), dc.create_model("dynconv_resnet8_cifar").eval()
    >>> with torch.no_grad(): MaskInputs(model)(x, *forced(model, x, density=0.5)).shape
    torch.Size([2, 10])
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        if not gates(model):
            raise _checks.no_gates("MaskInputs")
        self.model = model
        self._given: dict[str, Tensor] = {}
        for name, gate in gates(model).items():
            gate.register_forward_hook(_Given(name, self._given), prepend=True)
        self.train(model.training)

    def forward(self, x: Tensor, *masks: Tensor) -> Any:
        """x [N, C, H, W]; masks: one for each gate, in the order of `dc.gates(model)`, shaped as it decides."""
        names = list(gates(self.model))
        if len(masks) != len(names):
            raise ValueError(f"MaskInputs expects {len(names)} masks, one for each gate, got {len(masks)}")
        self._given.update(zip(names, masks, strict=True))
        try:
            return self.model(x)
        finally:
            self._given.clear()


class _Given:
    """A gate's hook; an object, so that a copy of the network looks into the copy's masks."""

    def __init__(self, name: str, masks: dict[str, Tensor]) -> None:
        self.name, self.masks = name, masks

    def __call__(self, _gate: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        if self.name not in self.masks:
            return output
        # A choice between the mask and itself keeps the gate's own work in the graph.
        return torch.where(output.bool(), self.masks[self.name], self.masks[self.name])


def forced(model: nn.Module, x: Tensor, density: float, seed: int = 0) -> list[Tensor]:
    """The masks that `force_masks(model, density, seed)` forces for x [N, C, H, W], one for each gate.

    Raises:
        ValueError: no gates, or density outside [0, 1].
    """
    found, hooks, masks = gates(model), forced_masks(model, density, seed), {}

    def keeper(name: str) -> Any:
        def keep(gate: nn.Module, args: tuple, output: Tensor) -> None:
            masks[name] = hooks[name](gate, args, output)

        return keep

    handles = [gate.register_forward_hook(keeper(name)) for name, gate in found.items()]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return [masks[name] for name in found]
