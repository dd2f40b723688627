"""Networks without trained weights, made fit for checks and timing."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree


class FirstResult(nn.Module):
    """A network up to the first tensor of what it returns, since engines are compared by one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        """x: [N, C, H, W]."""
        return _first(self.network(x))


def with_one_result(model: nn.Module, x: Tensor) -> nn.Module:
    """The network itself where it returns one tensor, as segmentation networks of torchvision do not.

    Raises:
        TypeError: it returns no tensor.
    """
    with torch.no_grad():
        result = model.eval()(x)
    first = _first(result)
    if first is result:
        return model
    if first is None:
        raise TypeError(f"{type(model).__name__} returns {type(result).__name__} without a tensor")
    return FirstResult(model).train(model.training)


def _first(result: object) -> Tensor | None:
    return next((leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, Tensor)), None)


@torch.no_grad()
def settle_norms_(model: nn.Module, x: Tensor, seed: int = 0) -> nn.Module:
    """Give every batch norm a scale, a shift and statistics as a trained network has them, in place.

    Fresh residual networks begin with scales of zero: their branches compute nothing but zeros, and a comparison of
    outputs would not see a branch that is wrong.

    Args:
        x: [N, C, H, W], N >= 2, pictures that the statistics come from; noise will do.
    Returns:
        The model, in evaluation mode.

    >>> import dynaconv as dc
    >>> model = settle_norms_(dc.create_model("resnet8_cifar"), torch.randn(4, 3, 32, 32))
    >>> 0.1 < float(model(torch.randn(1, 3, 32, 32)).detach().std()) < 10
    True
    """
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        if norm.affine:
            norm.weight.uniform_(0.5, 1.0, generator=generator)
            norm.bias.normal_(0, 0.2, generator=generator)
        norm.momentum = 1.0
    pooled: set[nn.Module] = set()

    def look(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0][0, 0].numel() == 1:
            pooled.add(norm)

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    model.train()
    model(x)
    for norm, momentum, hook in zip(norms, momenta, hooks, strict=True):
        hook.remove()
        norm.momentum = momentum
        if norm in pooled and norm.track_running_stats:
            # Pooled noise is nearly the same in every picture: a router that blew its differences up to a deviation of
            # one would do so with rounding, too.
            norm.running_var.clamp_(min=float(norm.running_mean.square().mean()))
    return model.eval()
