"""What the attention of a trained network does: its distribution, and accuracy when it is interfered with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.temperature import Tempered
from dynaconv.study.attention_stats import PartTally
from dynaconv.study.interventions import INTERVENTIONS, Intervention, applies, at_temperature, intervene
from dynaconv.study.layers import coefficients, dynamic_layers
from dynaconv.study.parts import parts_of

TEMPERATURES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
Tallies = dict[str, list[PartTally]]


def attention(
    model: nn.Module,
    data: Any,
    classes: Sequence[str],
    *,
    batch_size: int = 64,
    limit: int | None = None,
    temperatures: Sequence[float] = TEMPERATURES,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Study the coefficients of every dynamic layer on the pictures of `data`; the network is left as it was.

    Args:
        data: a data set of `dynaconv.data`, evaluated in a shuffled order, because attention is shuffled within
            batches. limit: number of pictures, None takes all. classes: their names.
        temperatures: for networks whose attention has one; sweeps nothing elsewhere.
        seed: of the order and of the permutations.
    Returns:
        {"images", "trained_temperature", "layers" (a row for each part of each layer), "classes" (rows), "accuracy" (a
        row for each intervention and part), "temperature" (rows)}.
    Raises:
        ValueError: a network without dynamic layers, no pictures, a temperature that is not positive.
    Source: interventions and temperatures of DY-Conv, arXiv 1912.03458, section 5; for the other methods alike.
    """
    tell = progress or (lambda _line: None)
    for temperature in temperatures:
        _checks.positive("temperature", temperature)
    layers, batches = dynamic_layers(model), Batches(data, batch_size, limit, seed)
    trained = sorted({float(m.temperature) for m in model.modules() if isinstance(m, Tempered)})
    with evaluating(model):
        tell(f"coefficients of {len(layers)} layers on {len(batches)} pictures")
        normal, tallies = observe(model, layers, batches, len(classes))
        if not tallies:
            raise _checks.study_no_coefficients()
        rows = [{"intervention": "normal", "part": "all", **normal}]
        for name, part in combinations(tallies):
            tell(f"accuracy, {name}, {part or 'all parts'}")
            change = Intervention(name, _means(tallies), part, seed)
            with intervene({n: layers[n] for n in tallies}, change):
                rows.append({"intervention": name, "part": part or "all", **score(model, batches, change)})
        sweep = []
        for temperature in temperatures if trained else ():
            tell(f"accuracy at temperature {temperature:g}")
            with at_temperature(model, temperature):
                found, seen = observe(model, layers, batches, len(classes))
            sweep.append({"temperature": temperature, **found, "entropy": _mean_entropy(seen)})
    return {
        "images": normal["images"],
        "trained_temperature": trained,
        "layers": [{"layer": n, **tally.result()} for n, parts in tallies.items() for tally in parts],
        "classes": [
            {"layer": n, "part": tally.part.name, **row, "class": classes[row["class"]]}
            for n, parts in tallies.items()
            for tally in parts
            for row in tally.by_class()
        ],
        "accuracy": rows,
        "temperature": sweep,
    }


class Batches:
    """Shuffled batches of pictures, the same at every pass."""

    def __init__(self, data: Any, batch_size: int, limit: int | None, seed: int) -> None:
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed)).tolist()
        self.data, self.batch_size, self.order = data, batch_size, order[:limit]
        if not self.order:
            raise _checks.train_no_images()

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.order), self.batch_size):
            yield self.data.__getitems__(self.order[start : start + self.batch_size])


def combinations(tallies: Tallies) -> list[tuple[str, str | None]]:
    """Interventions with the part they change: all parts, and each one alone where layers have several."""
    parts = {tally.part.name: tally.part for of_layer in tallies.values() for tally in of_layer}
    found: list[tuple[str, str | None]] = []
    for name in INTERVENTIONS:
        able = [part.name for part in parts.values() if applies(name, part)]
        if name != "normal" and able:
            found += [(name, None), *((name, part) for part in able if len(parts) > 1 and len(able) > 1)]
    return found


def observe(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Batches, classes: int
) -> tuple[dict[str, Any], Tallies]:
    """Accuracy and loss, and the tallies of every layer that ran."""
    tallies: Tallies = {}
    labels = torch.zeros(0, dtype=torch.long)

    def see(name: str, layer: nn.Module, routing: Tensor) -> None:
        if name not in tallies:
            tallies[name] = [PartTally(part, classes) for part in parts_of(layer)]
        for tally in tallies[name]:
            tally.add(routing, labels)

    sums = torch.zeros(3, dtype=torch.float64)
    with coefficients(layers, see):
        for images, labels in batches:
            sums += _score(model, images, labels)
    return _shares(sums), tallies


def score(model: nn.Module, batches: Batches, change: Intervention) -> dict[str, Any]:
    """Accuracy and loss with an intervention under way."""
    sums = torch.zeros(3, dtype=torch.float64)
    for images, labels in batches:
        change.start_batch(len(labels))
        sums += _score(model, images, labels)
    return _shares(sums)


def _score(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    logits = model(images).float()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack(
        [torch.tensor(float(len(labels))), (logits.argmax(1) == labels).sum().float(), loss]
    ).double()


def _shares(sums: Tensor) -> dict[str, Any]:
    images, correct, loss = sums.tolist()
    return {"accuracy": correct / images, "loss": loss / images, "images": int(images)}


def _means(tallies: Tallies) -> dict[str, Tensor]:
    """Mean coefficients of every layer in the shape of one image's."""
    found = {}
    for name, parts in tallies.items():
        flat = torch.cat([tally.mean for tally in parts])
        first = parts[0].part
        shape = (first.groups, first.size) if first.groups > 1 else (len(flat),)
        found[name] = flat.view(1, *shape)
    return found


def _mean_entropy(tallies: Tallies) -> float | None:
    """Mean over layers of the entropy of what weighs experts (of everything where nothing does)."""
    results = [tally.result() for parts in tallies.values() for tally in parts]
    mixing = [r for r in results if r["kind"] in ("softmax", "sigmoid") and r["entropy"] is not None]
    values = [r["entropy"] for r in mixing or results if r["entropy"] is not None]
    return sum(values) / len(values) if values else None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its mode back."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
