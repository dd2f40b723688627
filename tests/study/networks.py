"""Small networks with dynamic kernels, assembled by hand."""

from __future__ import annotations

import torch
from torch import nn

import dynaconv as dc
from dynaconv import nn as dnn


def static_network(width: int = 4, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return dc.create_model("resnet8_cifar", width=width, num_classes=4, image_size=16).eval()


def dynamic_network(layer: type[nn.Module] = dnn.DYConv2d, width: int = 4, seed: int = 0) -> nn.Module:
    """ResNet-8 whose 3x3 convolutions but the stem are drawn anew as `layer`."""
    model = static_network(width, seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Conv2d) and "layer" in name and module.kernel_size == (3, 3):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, layer.from_conv(module, init="fresh"))
    return model.eval()
