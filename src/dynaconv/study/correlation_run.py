"""Correlation between feature maps and between kernels, of a static network and a dynamic one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.study.correlation import CorrelationTally, Thresholds
from dynaconv.study.layers import coefficients, dynamic_layers
from dynaconv.study.stages import capture, choose_layer


def correlate(
    static: nn.Module,
    dynamic: nn.Module,
    batches: Iterable[Tensor],
    size: tuple[int, int, int],
    *,
    layers: tuple[str | None, str | None] = (None, None),
    kernels: tuple[str | None, str | None] = (None, None),
    thresholds: Thresholds | None = None,
    bins: int = 40,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Correlate the channels of one layer's output, and the filters of one convolution, in both networks.

    Args:
        static, dynamic: networks for the same pictures; they are left as they were.
        batches: pictures [N, C, H, W]; size: (C, H, W) of one.
        layers: names of the layers whose outputs are compared (static, dynamic); by default the second-last stages.
        kernels: names of the convolutions whose filters are compared; by default the last dynamic convolution of that
            stage, and the static one of the same name.
        progress: called with the number of pictures seen so far.
    Returns:
        {"layers", "kernel_layers", "features": {"static": ..., "dynamic": ...}, "kernels": the same}, leaves are
        `CorrelationResult`s as dicts.
    Raises:
        ValueError: unknown layers, a network without dynamic convolutions, outputs that are not [N, C, H, W].
    Source: arXiv 2004.10694, section on correlation; kernels as rows of flattened filters.
    """
    named = (choose_layer(static, size, layers[0]), choose_layer(dynamic, size, layers[1] or layers[0]))
    convs = choose_kernels(static, dynamic, named, kernels)
    limits = thresholds or Thresholds()
    tallies = {k: CorrelationTally(limits, bins) for k in ("static", "dynamic", "static kernel", "kernel")}
    tallies["static kernel"].add(static.get_submodule(convs[0]).weight.detach().flatten(1)[None])
    layer = dynamic.get_submodule(convs[1])

    def mixed(_name: str, _layer: nn.Module, routing: Tensor) -> None:
        tallies["kernel"].add(layer.kernels(routing)[0].flatten(2))

    seen = 0
    with capture(static, [named[0]]) as still, capture(dynamic, [named[1]]) as moving:
        for images in batches:
            with coefficients({convs[1]: layer}, mixed):
                dynamic(images)
            static(images)
            tallies["static"].add(_rows(still[named[0]], named[0]))
            tallies["dynamic"].add(_rows(moving[named[1]], named[1]))
            seen += len(images)
            if progress is not None:
                progress(seen)
    if not seen:
        raise _checks.train_no_images()
    found = {name: tally.result().to_dict() for name, tally in tallies.items()}
    return {
        "layers": list(named),
        "kernel_layers": list(convs),
        "features": {"static": found["static"], "dynamic": found["dynamic"]},
        "kernels": {"static": found["static kernel"], "dynamic": found["kernel"]},
    }


def _rows(output: Tensor, name: str) -> Tensor:
    """Channels by positions."""
    if not isinstance(output, Tensor) or output.dim() != 4:
        raise _checks.study_not_feature_map(name, getattr(output, "shape", type(output).__name__))
    return output.flatten(2)


def choose_kernels(
    static: nn.Module,
    dynamic: nn.Module,
    stages: tuple[str, str],
    asked: tuple[str | None, str | None],
) -> tuple[str, str]:
    """Names of the static and the dynamic convolution whose filters are compared.

    Raises:
        ValueError: a name that is no such convolution, or no dynamic convolution in the stage.
    """
    moving = {n: m for n, m in dynamic_layers(dynamic).items() if isinstance(m, DynamicConv)}
    inside = [n for n in moving if n.startswith(f"{stages[1]}.") or n == stages[1]]
    if asked[1] is not None and asked[1] not in moving:
        raise _checks.unknown("dynamic convolution", asked[1], moving)
    if asked[1] is None and not inside:
        raise _checks.study_no_dynamic_stage(stages[1], list(moving))
    second = asked[1] or [n for n in inside if "downsample" not in n][-1]
    still = {n: m for n, m in static.named_modules() if isinstance(m, nn.Conv2d)}
    if asked[0] is not None and asked[0] not in still:
        raise _checks.unknown("static convolution", asked[0], still)
    return asked[0] or _partner(still, moving[second], second, stages[0]), second


def _partner(still: dict[str, nn.Conv2d], layer: DynamicConv, name: str, stage: str) -> str:
    """The static convolution of the same name (blocks with a shared router are wrapped), or the last alike."""
    bare = ".".join(part for part in name.split(".") if part != "block")
    if bare in still:
        return bare
    alike = [
        n
        for n, conv in still.items()
        if n.startswith(f"{stage}.") and conv.kernel_size == layer.kernel_size and "downsample" not in n
    ]
    if not alike:
        raise _checks.study_no_partner(name, stage)
    return alike[-1]


def noise(count: int, size: tuple[int, int, int], batch: int, seed: int = 0) -> Iterable[Tensor]:
    """Standard-normal pictures, for networks without a data set."""
    generator = torch.Generator().manual_seed(seed)
    for start in range(0, count, batch):
        yield torch.randn(min(batch, count - start), *size, generator=generator)
