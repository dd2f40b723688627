"""Every gate type on one tiny network, with gates that decide differently for different images and positions."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import GateConfig
from dynaconv.nn import HaltingUnit

GATES: dict[str, GateConfig] = {
    "spatial": dc.SpatialMasking(),
    "spatial_paper": dc.SpatialMasking(preset="paper"),
    "spatial_coarse": dc.SpatialMasking(granularity=2),
    "layer": dc.LayerGate(),
    "sact": dc.Halting(),
    "act": dc.Halting(level="image"),
    "channels": dc.ChannelGate(groups=4),
    "random": dc.RandomMasking(),
    "narrow": dc.Narrow(),
}


def images(count: int, seed: int = 0, size: int = 16) -> Tensor:
    """Noise of very different contrast [count, 3, size, size], so that gates tell images apart."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(count, 1, 1, 1, generator=generator) + 0.7
    return torch.randn(count, 3, size, size, generator=generator) * scale


def static(width: int = 4) -> nn.Module:
    """A ResNet-14 with batch norms that have seen images."""
    torch.manual_seed(0)
    return dc.create_model("resnet14_cifar", width=width, image_size=16)


def gated(kind: str, width: int = 4) -> nn.Module:
    """The network with a gate of this kind, in evaluation mode."""
    model = static(width)
    dc.dynamize_(model, GATES[kind])
    for gate in dc.gates(model).values():
        for name, parameter in gate.named_parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.15 if "conv" in name else 0.7)
        if isinstance(gate, HaltingUnit):
            gate.threshold.fill_(6.0 if kind == "sact" else 8.5)
    model.train()
    with torch.no_grad():
        for seed in range(3):
            model(images(16, seed))
    return model.eval()
