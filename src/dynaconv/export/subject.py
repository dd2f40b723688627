"""The copy of a network that is exported: checked, norms folded, forced masks left behind, gates watched."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv import _checks
from dynaconv.convert import fuse_, masked_blocks
from dynaconv.cost import collect_masks, profile
from dynaconv.cost.blocks import block_cost
from dynaconv.nn._fold import norm_activation
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_block import MaskedBlock


def check_subject(model: nn.Module, example: tuple[Any, ...]) -> None:
    """Raise unless a network in evaluation mode and an example with images were given.

    Raises:
        ValueError: training mode, another device, or an example without images. TypeError: wrong kinds of arguments.
    """
    if not isinstance(model, nn.Module):
        raise _checks.export_model(model)
    _checks.export_example(example)
    training = [name for name, module in model.named_modules() if module.training]
    if training:
        raise _checks.export_training(training[0])


def prepare(model: nn.Module, example: tuple[Any, ...]) -> nn.Module:
    """A copy without forced masks, ready for `torch.export`; raises as `check_subject` does."""
    check_subject(model, example)
    model = copy.deepcopy(model)
    for module in model.modules():
        module._forward_hooks = type(module._forward_hooks)(
            (k, h) for k, h in module._forward_hooks.items() if not getattr(h, "forces_masks", False)
        )
    return model


def fold_norms_(model: nn.Module) -> None:
    """Batch norm into the convolution before it, static or dynamic, also inside masked blocks."""
    # A network that torch.fx cannot trace keeps its norms; the ONNX passes fold what is left.
    with contextlib.suppress(ValueError):
        fuse_(model)
    for block in masked_blocks(model).values():
        for step in block.anatomy.steps:
            _fold_dynamic(block, step.conv, step.norm)


def _fold_dynamic(block: MaskedBlock, conv_path: str, norm_path: str | None) -> None:
    conv, norm = block.part(conv_path), block.part(norm_path)
    if isinstance(conv, DynamicConv) and isinstance(norm, _BatchNorm) and norm.running_var is not None:
        conv.fold_norm_(norm)
        left = norm_activation(norm) or nn.Identity()
        block.inner.set_submodule(norm_path, left.train(norm.training))


def forget_executions_(model: nn.Module) -> None:
    """How dynamic convolutions were told to run here says nothing about a file."""
    for module in model.modules():
        if isinstance(module, DynamicConv):
            module.execution = "auto"


def fixed_macs(model: nn.Module, example: tuple[Any, ...]) -> float:
    """Multiply-adds of one image that masks do not change: neither inside masked branches nor in gates that vary."""
    counted = profile(model, example[0], include_linear=True)
    with torch.no_grad(), collect_masks(model) as masks:
        model(*example)
    conditional = sum(cost.executed_macs for cost in masks.costs().values())
    varying = conditional + sum(masks.routing.values())
    return float((counted.executed_macs.double() - varying)[0])


class Watch:
    """Makes a network return what its gates decided beside its own result: (leaves..., mask, mask, ...).

    `names` are those of the gates that decided, in forward order.

    Args:
        fixed_macs: multiply-adds that masks do not change; given, the executed ones [N] come before the masks.
    """

    def __init__(self, model: nn.Module, fixed_macs: float | None = None) -> None:
        self.names: list[str] = []
        self.fixed_macs = fixed_macs
        self._masks: dict[str, Tensor] = {}
        self._executed: list[Tensor] = []
        for name, block in masked_blocks(model).items():
            block.gate.register_forward_hook(self._keeper(name, block))
        model.register_forward_hook(self._result)

    def _keeper(self, name: str, block: MaskedBlock) -> Any:
        def keep(_gate: nn.Module, args: tuple, mask: Tensor) -> None:
            self._masks[name] = mask
            if self.fixed_macs is not None:
                self._executed.append(block_cost(block, mask, tuple(args[0].shape[2:])).executed_macs)
                spent = block.gate.spent_macs(*args)
                self._executed += [] if spent is None else [spent]

        return keep

    def _result(self, _model: nn.Module, _args: tuple, output: Any) -> tuple[Tensor, ...]:
        leaves = [v for v in torch.utils._pytree.tree_leaves(output) if isinstance(v, Tensor)]
        masks, self.names = list(self._masks.values()), list(self._masks)
        # A tensor of the trace that outlives it would count as a leak.
        self._masks.clear()
        if self.fixed_macs is not None:
            leaves.append((sum(self._executed) + self.fixed_macs).float())
            self._executed.clear()
        return (*leaves, *masks)
