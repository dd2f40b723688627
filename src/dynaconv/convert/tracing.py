"""Reading a block's forward as a graph, without running it and without leaving anything on it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynaconv.convert.normal_form import in_normal_form
from dynaconv.nn.dynamic_conv import DynamicLayer

# What a forward may raise that was not written for tracing.
_NOT_TRACEABLE = (
    fx.proxy.TraceError, TypeError, ValueError, RuntimeError, AttributeError, AssertionError, LookupError,
    NotImplementedError, ArithmeticError,
)  # fmt: skip


class Untraceable(Exception):
    """A forward whose steps depend on values, with the reason."""


class _Tracer(fx.Tracer):
    """Looks into everything but layers of torch, batch norms, dynamic layers, and what does nothing in evaluation."""

    # What is computed from a buffer while tracing would be a constant otherwise, and not follow the buffer.
    proxy_buffer_attributes = True

    def __init__(self, block: nn.Module, shallow: bool) -> None:
        super().__init__()
        self._shallow = shallow
        # Before tracing, which would take part in the trial.
        self._noise = set() if shallow else {m for m in block.modules() if m is not block and is_noise(m)}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if self._shallow or isinstance(m, (DynamicLayer, _BatchNorm)) or m in self._noise:
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """A value, of whose parts some can be counted."""
        return fx.Proxy(node, self) if _parts(node) is None else _Parts(node, self)


class _Parts(fx.Proxy):
    """What `x.chunk(2, 1)` returns: a forward may go through it, or make a list of it."""

    def __len__(self) -> int:
        parts = _parts(self.node)
        assert parts is not None, "only values with parts are such"
        return parts

    def __iter__(self) -> Iterator[fx.Proxy]:
        return (self[i] for i in range(len(self)))


def _parts(node: fx.Node) -> int | None:
    """Number of maps that a chunk or a split into given sizes returns."""
    if node.op not in ("call_function", "call_method"):
        return None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    names = {"chunk": "chunks", "tensor_split": "indices_or_sections", "split": "split_size_or_sections"}
    if name not in names and name != "split_with_sizes":
        return None
    cut = node.args[1] if len(node.args) > 1 else node.kwargs.get(names.get(name, ""), None)
    if isinstance(cut, (tuple, list)):
        return len(cut) + (name == "tensor_split")
    return cut if isinstance(cut, int) and name in ("chunk", "tensor_split") else None


def trace(block: nn.Module, *, shallow: bool = False) -> fx.Graph:
    """The graph of a block's forward(x) in the mode that the block is in.

    Args:
        shallow: only the block's own forward; every module that it calls is one node.
    Raises:
        Untraceable: with the reason.
    """
    tracer, attributes = _Tracer(block, shallow), dict(vars(block))
    try:
        graph = tracer.trace(block)
    except _NOT_TRACEABLE as error:
        lines = str(error).strip().splitlines()
        # What fx says behind the first sentence is about fx.
        raise Untraceable(lines[0].split(". ")[0] if lines else type(error).__name__) from error
    finally:
        for name in set(vars(block)) - set(attributes):
            delattr(block, name)
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    if len(inputs) != 1:
        # Even a default may be given by the caller.
        raise Untraceable(f"its forward takes {len(inputs)} inputs, expected one feature map")
    return in_normal_form(graph, block)


def is_noise(module: nn.Module) -> bool:
    """The module passes its input on in evaluation: dropout, stochastic depth, DropBlock, whatever their names."""
    if isinstance(module, nn.Identity) or next(module.parameters(), None) is not None:
        return isinstance(module, nn.Identity)
    if next(module.buffers(), None) is not None:
        return False
    x = 10 * torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    with modes_kept(module), torch.no_grad():
        module.eval()
        try:
            y = module(x.clone())
        except _NOT_TRACEABLE:
            return False
    return isinstance(y, torch.Tensor) and torch.equal(x, y)


@contextmanager
def modes_kept(block: nn.Module) -> Iterator[None]:
    """Every module inside has its training mode back at the end."""
    modes = {module: module.training for module in block.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def signature(graph: fx.Graph) -> list[tuple[str, str, str]]:
    """What a graph does, in words that can be compared with another trace of the same block."""
    return [(n.op, str(n.target), str((n.args, n.kwargs))) for n in graph.nodes]
