"""The dynamic layers of a network, and a look at (or a hand on) the coefficients they use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicLayer


def dynamic_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every layer that takes coefficients, by name: dynamic convolutions and dynamic classifiers.

    Raises:
        ValueError: there are none.
    """
    found = {name: m for name, m in model.named_modules() if isinstance(m, DynamicLayer)}
    if not found:
        raise _checks.study_no_dynamic_layers(type(model).__name__)
    return found


@contextmanager
def coefficients(
    layers: Mapping[str, nn.Module], use: Callable[[str, nn.Module, Tensor], Tensor | None]
) -> Iterator[None]:
    """Show `use(name, layer, routing)` the coefficients of every forward pass; what it returns is used instead.

    They go in through `forward(x, routing=...)`, so nothing of the layers is changed, and the hooks go away at the end,
    after an error too. Coefficients that a block's shared router hands out are seen like a layer's own.
    """
    handles = [
        layer.register_forward_pre_hook(_hook(name, use), with_kwargs=True, prepend=True)
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(name: str, use: Callable[[str, nn.Module, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        named = dict(zip(("x", "routing"), args, strict=False)) | kwargs
        if named.get("routing") is None:
            named["routing"] = layer.route(named["x"])
        changed = use(name, layer, named["routing"])
        if changed is not None:
            named["routing"] = changed
        return (named.pop("x"),), named

    return hook
