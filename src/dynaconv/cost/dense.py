"""Counting the multiply-adds of a network that computes every position, operation by operation.

Convolutions count kh * kw * C_in * C_out / groups per output position, plus C_out for a bias; linear layers
in * out. A linear layer over a map [N, h, w, C] is a 1x1 convolution. Batch norm, activations, additions, pooling
count nothing. Layers with a kernel per sample state their own cost: the convolution, mixing and routing apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dynaconv.convert import dynamic_layers, masked_blocks
from dynaconv.cost.masks import collect_masks
from dynaconv.nn.dynamic_conv import DynamicConv, KernelMacs
from dynaconv.nn.masked_block import MaskedBlock
from dynaconv.nn.routed_block import RoutedBlock

_CONV = (torch.ops.aten.convolution, torch.ops.aten._convolution, torch.ops.aten.cudnn_convolution)


@dataclass
class DenseCounts:
    """Multiply-adds of one image by module name: convolutions and linear layers apart."""

    convs: dict[str, int] = field(default_factory=dict)
    linears: dict[str, int] = field(default_factory=dict)
    gate_names: tuple[str, ...] = ()
    kernels: dict[str, KernelMacs] = field(default_factory=dict)
    routers: dict[str, int] = field(default_factory=dict)

    @property
    def kernel_extra(self) -> int:
        """Mixing and routing of the dynamic layers, shared routers included."""
        own = sum(k.mixing + k.routing for k in self.kernels.values())
        return own + sum(self.routers.values())

    @property
    def static(self) -> int:
        """Convolutions of the static network, without gates."""
        return sum(v for name, v in self.convs.items() if not self.is_gate(name))

    @property
    def gates(self) -> int:
        """Convolutions of the gates."""
        return sum(v for name, v in self.convs.items() if self.is_gate(name))

    def is_gate(self, name: str) -> bool:
        """The module belongs to a gate."""
        return any(name == g or name.startswith(g + ".") for g in self.gate_names)


def count_dense(model: nn.Module, size: tuple[int, int, int], *, biases: bool = True) -> DenseCounts:
    """Count one image of `size` = (C, H, W), with every position computed; the model is left as it was.

    Args:
        biases: a convolution's bias counts C_out per position (DynConv's convention) or nothing (the dynamic kernels').
    Raises:
        RuntimeError, ValueError: the network does not accept such an image.
    """
    parameter = next(model.parameters(), torch.zeros(()))
    x = torch.zeros(1, *size, device=parameter.device, dtype=parameter.dtype)
    counter = FlopCounterMode(
        display=False, custom_mapping=dict.fromkeys(_CONV, _conv_flops if biases else _plain_flops)
    )
    with (
        _dense_evaluation(model),
        torch.no_grad(),
        collect_masks(model) as masks,
        _kernel_costs(model) as kernels,
        _linears_over_maps(model) as pointwise,
        counter,
    ):
        model(x)
    counts = DenseCounts(gate_names=tuple(f"{name}.gate" for name in masks.blocks), kernels=kernels)
    counts.routers = {
        f"{name}.router": m.router.macs for name, m in model.named_modules() if isinstance(m, RoutedBlock)
    }
    # A masked block asks the routers inside it by itself, so their counts land on it; it has no layers of its own.
    wrappers = {n for n, m in model.named_modules() if isinstance(m, MaskedBlock | RoutedBlock)}
    stated = [*kernels, *counts.routers]
    for name, by_op in _own_counts(model, counter).items():
        if counts.is_gate(name) or name in wrappers:
            continue
        if any(name == s or name.startswith(f"{s}.") for s in stated):
            continue
        convs = sum(v for op, v in by_op.items() if op in _CONV)
        others = sum(v for op, v in by_op.items() if op not in _CONV)
        if convs:
            counts.convs[name] = convs // 2
        if others:
            counts.linears[name] = others // 2
    for name, positions in pointwise.items():
        layer = model.get_submodule(name)
        bias = layer.out_features if biases and layer.bias is not None else 0
        counts.linears.pop(name, None)
        counts.convs[name] = positions * (layer.weight.numel() + bias)
    sizes = {name: [size for _, size in runs] for name, runs in masks.runs.items()}
    for name, own in sizes.items():
        runs = [masks.blocks[name].functions(size, biases) for size in own]
        for path in runs[0]:
            counts.convs[f"{name}.{path}"] = sum(run[path] for run in runs)
    for name, cost in kernels.items():
        convolution = isinstance(model.get_submodule(name), DynamicConv)
        (counts.convs if convolution else counts.linears)[name] = cost.static
    # A gate states its own cost, since it may run its convolution in another form.
    for name, own in sizes.items():
        counts.convs[f"{name}.gate"] = sum(masks.blocks[name].gate.macs(size) for size in own)
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    counts.convs = dict(sorted(counts.convs.items(), key=lambda item: order.get(item[0], len(order))))
    return counts


@contextmanager
def _linears_over_maps(model: nn.Module) -> Iterator[dict[str, int]]:
    """Positions of the linear layers that run over a map [N, h, w, C]: they are 1x1 convolutions, and count as such."""
    positions: dict[str, int] = {}

    def hook_for(name: str):
        def hook(_layer: nn.Module, args: tuple, _output: torch.Tensor) -> None:
            if args and args[0].dim() == 4:
                positions[name] = positions.get(name, 0) + math.prod(args[0].shape[1:3])

        return hook

    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield positions
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _kernel_costs(model: nn.Module) -> Iterator[dict[str, KernelMacs]]:
    """What the dynamic layers that run in the `with` block cost for one image, by name."""
    costs: dict[str, KernelMacs] = {}

    def hook_for(name: str):
        def hook(layer: nn.Module, _args: tuple, output: torch.Tensor) -> None:
            costs[name] = layer.macs(math.prod(output.shape[2:]))

        return hook

    layers = dynamic_layers(model)
    handles = [layer.register_forward_hook(hook_for(name)) for name, layer in layers.items()]
    try:
        yield costs
    finally:
        for handle in handles:
            handle.remove()


def _conv_flops(
    x_shape, w_shape, bias, _stride, _padding, _dilation, transposed, *_args, out_shape=None, **_kw
) -> int:
    positions = math.prod((x_shape if transposed else out_shape)[2:]) * x_shape[0]
    with_bias = 0 if bias is None else out_shape[1] * math.prod(out_shape[2:]) * x_shape[0]
    return 2 * (math.prod(w_shape) * positions + with_bias)


def _plain_flops(x_shape, w_shape, _bias, *args, out_shape=None, **kw) -> int:
    return _conv_flops(x_shape, w_shape, None, *args, out_shape=out_shape, **kw)


def _own_counts(model: nn.Module, counter: FlopCounterMode) -> dict[str, dict]:
    """Counts by module without what its descendants did, names relative to the model."""
    root = type(model).__name__
    totals = {}
    for name, by_op in counter.get_flop_counts().items():
        if name == root or name.startswith(root + "."):
            totals[name[len(root) + 1 :]] = dict(by_op)
    own = {name: dict(by_op) for name, by_op in totals.items()}
    for name, by_op in totals.items():
        # The caller is the nearest ancestor that was itself called; containers in between never are.
        caller = name.rpartition(".")[0]
        while caller and caller not in totals:
            caller = caller.rpartition(".")[0]
        if name and caller in own:
            for op, value in by_op.items():
                own[caller][op] = own[caller].get(op, 0) - value
    return own


@contextmanager
def _dense_evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with every masked block on its dense path; restores modes and backends."""
    modes = {m: m.training for m in model.modules()}
    blocks = list(masked_blocks(model).values())
    backends = [b.backend for b in blocks]
    try:
        model.eval()
        for block in blocks:
            block.backend = "eager"
        yield
    finally:
        for block, backend in zip(blocks, backends, strict=True):
            block.backend = backend
        for module, mode in modes.items():
            module.training = mode


def guess_input_size(model: nn.Module) -> tuple[int, int, int]:
    """(C, H, W) that the model says it wants (`input_size`, timm's `pretrained_cfg`), else C x 224 x 224."""
    own = getattr(model, "input_size", None)
    cfg = getattr(model, "pretrained_cfg", None)
    if isinstance(own, tuple) and len(own) == 3:
        return own
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    channels = 3 if first is None else first.in_channels
    if isinstance(cfg, dict) and len(cfg.get("input_size") or ()) == 3:
        return (channels, *cfg["input_size"][1:])
    return channels, 224, 224
