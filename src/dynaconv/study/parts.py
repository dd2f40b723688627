"""What the coefficients of a dynamic layer mean: mixtures of experts, gains, and matrices."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from dynaconv.nn.condconv import CondLinear
from dynaconv.nn.mixture import MixtureConv

# softmax: a convex mixture of experts; sigmoid: an unnormalised one; gain: a factor each for channels or taps;
# matrix: entries of any sign.
EXPERTS = ("softmax", "sigmoid")


@dataclass(frozen=True)
class Part:
    """One kind of coefficient of a layer.

    name: what it weighs; kind: softmax, sigmoid, gain or matrix; start, groups, size: its place in the flattened
    coefficients of one image, `groups` times `size` numbers (DyNet has a group for each output channel); top: the
    largest value it can take, None for a matrix.
    """

    name: str
    kind: str
    start: int
    groups: int
    size: int
    top: float | None = 1.0

    @property
    def mixes(self) -> bool:
        """Whether it weighs experts against each other."""
        return self.kind in EXPERTS

    def read(self, routing: Tensor) -> Tensor:
        """Its coefficients [B, groups, size] out of a layer's coefficients [B, ...]."""
        flat = routing.flatten(1)[:, self.start : self.start + self.groups * self.size]
        return flat.unflatten(1, (self.groups, self.size))

    def write(self, routing: Tensor, values: Tensor) -> Tensor:
        """A copy of `routing` with these coefficients [B, groups, size] in it."""
        flat = routing.flatten(1).clone()
        flat[:, self.start : self.start + self.groups * self.size] = values.flatten(1).to(flat.dtype)
        return flat.view(routing.shape)


def parts_of(layer: nn.Module) -> list[Part]:
    """The parts of a layer's coefficients, in their order; a part with a single coefficient stands for nothing."""
    kind = type(layer).__name__.rstrip("123d")
    if kind == "ODConv":
        sizes = layer.sizes
        names = {
            "channel": "input channels",
            "filter": "output channels",
            "spatial": "taps",
            "kernel": "kernels",
        }
        counts = [(names[field], count) for field, count in sizes._asdict().items() if count]
        return _in_order([(name, "softmax" if name == "kernels" else "gain", n, 1.0) for name, n in counts])
    if kind.startswith("DCD"):
        outputs, latent = layer.weight.shape[0], layer.latent_channels
        return _in_order([("output channels", "gain", outputs, 2.0), ("fusion", "matrix", latent**2, None)])
    if isinstance(layer, (MixtureConv, CondLinear)):
        shape = getattr(layer, "routing_shape", None) or (layer.num_experts,)
        groups, size = (1, *shape) if len(shape) == 1 else shape
        return [Part("experts", "softmax" if kind == "DYConv" else "sigmoid", 0, groups, size)]
    return [Part("coefficients", "gain", 0, 1, layer.routing_shape[0])]


def _in_order(parts: list[tuple[str, str, int, float | None]]) -> list[Part]:
    made, start = [], 0
    for name, kind, size, top in parts:
        made.append(Part(name, kind, start, 1, size, top))
        start += size
    return made
