"""Compare skipping with computing everywhere, block by block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dynaconv.convert import masked_blocks
from dynaconv.cost import collect_masks


@torch.no_grad()
def compare_with_dense(model: nn.Module, x: Tensor) -> dict[str, float]:
    """Largest relative deviation between skipping and the masked dense computation, block by block.

    Every block is given the same input and the same mask on both paths, so a difference in one block is not hidden or
    amplified by another.

    Args:
        x: [N, C, H, W].
    Returns:
        block name -> max |sparse - dense| / max |dense|; below 1e-4 is rounding in float32.
    """
    blocks = masked_blocks(model)
    modes = {module: module.training for module in model.modules()}
    inputs: dict[str, Tensor] = {}
    handles = [
        block.register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, block in blocks.items()
    ]
    deviations = {}
    try:
        model.eval()
        with collect_masks(model) as masks:
            model(x)
        for name, source in inputs.items():
            block, mask = blocks[name], masks[name].as_subclass(Tensor)
            forced = block.gate.register_forward_hook(lambda _m, _a, _o, mask=mask: mask, prepend=True)
            try:
                fast = block(source)
            finally:
                forced.remove()
            slow = block.dense_forward(source, mask)
            deviations[name] = float((fast - slow).abs().max() / slow.abs().max().clamp(min=1e-12))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    return deviations
