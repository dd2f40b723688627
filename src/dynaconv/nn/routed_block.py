"""One router for several dynamic layers of a block: computed once from the block's input, passed on explicitly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch.fx
from torch import Tensor, nn

from dynaconv import _checks

_Forward = Callable[..., Tensor]


class RoutedBlock(nn.Module):
    """Wraps a block, unchanged, as `block`; `router` sees its input and serves the dynamic layers at `layers`.

    The block's forward is traced once (everything but the dynamic layers and what contains them is opaque), so that the
    coefficients are ordinary arguments: no state is left on modules, a reordered or reused block cannot pair the wrong
    coefficients, and compilers see plain data flow.

    Args:
        block: any module whose forward takes one tensor.
        router: x -> one tensor of coefficients for all layers, or a tuple with one for each.
        layers: paths inside the block of layers that take `routing=`, in the order of the router's tuple.
    Raises:
        ValueError: the block's forward cannot be traced, or calls a layer never or twice.
    Source: CondConv (arXiv 1904.04971, section 4.2) and DyNet (OpenReview SyeZIkrKwS): one predictor for a block.
    """

    def __init__(self, block: nn.Module, router: nn.Module, layers: Sequence[str]) -> None:
        super().__init__()
        self.block, self.router, self.layers = block, router, tuple(layers)
        self._forwards = _both_modes(block, self.layers)
        # Parts keep their modes: a norm that was frozen by hand stays frozen.
        self.training = block.training
        router.train(block.training)

    def route(self, x: Tensor) -> dict[str, Tensor]:
        """Coefficients of every layer, by its path, for the block's input x [B, C, H, W]."""
        made = self.router(x)
        each = made if isinstance(made, tuple) else (made,) * len(self.layers)
        return dict(zip(self.layers, each, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        """What the block computes, with the coefficients for x."""
        return self._forwards[self.block.training](self.block, x, *self.route(x).values())

    def __getstate__(self) -> dict:
        """Copies and pickles trace again."""
        return {name: value for name, value in self.__dict__.items() if name != "_forwards"}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._forwards = _both_modes(self.block, self.layers)

    def extra_repr(self) -> str:
        """Settings shown by print(model)."""
        return f"layers={self.layers}"


class _Tracer(torch.fx.Tracer):
    def __init__(self, layers: Sequence[str]) -> None:
        super().__init__()
        self._layers = layers

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not any(layer.startswith(f"{module_qualified_name}.") for layer in self._layers)


def _both_modes(block: nn.Module, layers: Sequence[str]) -> dict[bool, _Forward]:
    """The block's forward with extra arguments, traced as it runs in training and in evaluation."""
    with _modes_kept(block):
        return {mode: _traced(block.train(mode), layers) for mode in (True, False)}


@contextmanager
def _modes_kept(block: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in block.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _traced(block: nn.Module, layers: Sequence[str]) -> _Forward:
    try:
        graph = _Tracer(layers).trace(block)
    except (torch.fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise _checks.cannot_route(type(block).__name__, str(error)) from error
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    for extra in inputs[1:]:
        if extra.users or not extra.args:
            raise _checks.cannot_route(type(block).__name__, f"its forward also takes {extra.target!r}")
        graph.erase_node(extra)
    after = inputs[0]
    for i, layer in enumerate(layers):
        calls = [n for n in graph.nodes if n.op == "call_module" and n.target == layer]
        if len(calls) != 1:
            raise _checks.cannot_route(
                type(block).__name__, f"it calls {layer} {len(calls)} times, expected once"
            )
        with graph.inserting_after(after):
            after = graph.placeholder(f"routing_{i}")
        calls[0].kwargs = {**calls[0].kwargs, "routing": after}
    code = graph.python_code("self")
    scope = dict(code.globals)
    exec(code.src, scope)
    return scope["forward"]
