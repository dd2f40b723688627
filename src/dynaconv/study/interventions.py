"""What may be done to attention at evaluation: average it, sharpen it, give it to other images (arXiv 1912.03458)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dynaconv.nn.temperature import Tempered
from dynaconv.study.layers import coefficients
from dynaconv.study.parts import Part, parts_of

INTERVENTIONS = {
    "normal": "as trained",
    "mean kernel": "the same weight for every expert, their sum kept",
    "arg-max": "all of the weight on the largest expert",
    "mean attention": "every coefficient at its mean over the images: a static network",
    "shuffled across images": "every image gets another image's coefficients, in all layers the same one's",
    "shuffled per image": "the coefficients of a layer permuted, anew for each image and layer",
}


def applies(intervention: str, part: Part) -> bool:
    """Whether an intervention means something for a part."""
    if part.groups * part.size == 1 and part.mixes and intervention != "mean attention":
        return False
    if intervention in ("mean kernel", "arg-max"):
        return part.mixes
    if part.kind == "matrix":
        return intervention in ("normal", "mean attention", "shuffled across images")
    return True


@dataclass
class Intervention:
    """A change of the coefficients, for `intervene`.

    Args:
        name: one of `INTERVENTIONS`. means: layer -> mean coefficients [1, ...], for "mean attention".
        only: names of the parts to change, None changes all that it applies to. seed: of the permutations.
    """

    name: str
    means: Mapping[str, Tensor]
    only: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.partner = torch.zeros(0, dtype=torch.long)

    def start_batch(self, images: int) -> None:
        """Draw which image gets whose coefficients; none keeps its own, unless it is alone."""
        order = torch.randperm(images, generator=self.generator)
        self.partner = torch.empty_like(order).index_copy_(0, order, order.roll(1))

    def __call__(self, name: str, layer: nn.Module, routing: Tensor) -> Tensor:
        """The coefficients to use instead."""
        for part in parts_of(layer):
            if applies(self.name, part) and self.only in (None, part.name):
                routing = part.write(routing, self._changed(name, part, routing))
        return routing

    def _changed(self, name: str, part: Part, routing: Tensor) -> Tensor:
        values = part.read(routing)
        if self.name == "mean kernel":
            return values.mean(2, keepdim=True).expand_as(values)
        if self.name == "arg-max":
            best = torch.zeros_like(values).scatter_(2, values.argmax(2, keepdim=True), 1.0)
            return best * values.sum(2, keepdim=True)
        if self.name == "mean attention":
            return part.read(self.means[name].to(routing)).expand_as(values)
        if self.name == "shuffled across images":
            return values[self.partner.to(values.device)]
        if self.name == "shuffled per image":
            order = torch.rand(values.shape, generator=self.generator).argsort(2).to(values.device)
            return values.gather(2, order)
        return values


@contextmanager
def intervene(layers: Mapping[str, nn.Module], intervention: Intervention) -> Iterator[None]:
    """Change the coefficients of `layers` for the block; nothing of the layers is changed."""
    with coefficients(layers, intervention):
        yield


@contextmanager
def at_temperature(model: nn.Module, temperature: float | None) -> Iterator[None]:
    """Another temperature for the block; each attention gets its own one back, after an error too."""
    tempered = [m for m in model.modules() if isinstance(m, Tempered)] if temperature is not None else []
    before = [m.temperature.clone() for m in tempered]
    try:
        for module in tempered:
            module.temperature.fill_(temperature)
        yield
    finally:
        for module, value in zip(tempered, before, strict=True):
            module.temperature.copy_(value)
