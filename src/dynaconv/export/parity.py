"""Does an exported network compute what eager PyTorch computes? Asked of ONNX Runtime before the file is written."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.export.runtimes import onnxruntime_session
from dynaconv.export.trace import Traced

TOLERANCE = 1e-4


class Parity(NamedTuple):
    """error: largest difference over the largest magnitude. flips: share of mask positions decided differently."""

    error: float
    flips: float


def can_check() -> bool:
    """ONNX Runtime is installed."""
    return find_spec("onnxruntime") is not None


def check_graph(
    traced: Traced, data: bytes, model: nn.Module, example: tuple[Tensor, ...], feed: dict[str, np.ndarray],
    tolerance: float = TOLERANCE,
) -> Parity:  # fmt: skip
    """Compare a graph that still returns its masks with the network, which is given the same masks.

    A logit within rounding of its threshold may fall to the other side in another order of summation; that changes a
    mask, not the arithmetic. So eager PyTorch runs with the masks of the graph, and flips are counted beside it.

    Args:
        data: the serialised graph. feed: the values of its other inputs.
    Raises:
        RuntimeError: they differ by more than `tolerance`.
    """
    session, worst = onnxruntime_session(data), Parity(0.0, 0.0)
    for inputs in _batches(example, traced.dynamic_batch):
        names = [f"input_{i}" if i else "images" for i in range(len(inputs))]
        got = session.run(None, feed | {n: t.numpy() for n, t in zip(names, inputs, strict=True)})
        masks = dict(zip(traced.gates, got[len(got) - len(traced.gates) :], strict=True))
        results = [a for a, name in zip(got, traced.names, strict=False) if name.startswith("output")]
        one = _compare(model, inputs, results, masks)
        worst = Parity(max(worst.error, one.error), max(worst.flips, one.flips))
        if not one.error <= tolerance:
            raise _checks.export_differs("ONNX Runtime", one.error, tolerance, f"batch {len(inputs[0])}")
    return worst


def check_program(exported: Any, model: nn.Module, x: Tensor, tolerance: float = TOLERANCE) -> float:
    """Largest difference of a `torch.export` program from the network on x [N, C, H, W].

    Raises:
        RuntimeError: they differ by more than `tolerance`.
    """
    with torch.no_grad():
        pairs = zip(*(_pytree.tree_leaves(run(x)) for run in (exported.module(), model)), strict=True)
        errors = [_relative(a.numpy(), b.numpy()) for a, b in pairs if isinstance(a, Tensor)]
    worst = max(errors, default=0.0)
    if not worst <= tolerance:
        raise _checks.export_differs("torch.export", worst, tolerance, f"batch {len(x)}")
    return worst


def _batches(example: tuple[Tensor, ...], dynamic: bool) -> list[tuple[Tensor, ...]]:
    """The example, and where the batch is free, one image and three made of it."""
    if not dynamic:
        return [tuple(example)]
    one = tuple(t[:1].contiguous() for t in example)
    turned = [torch.cat([t[:1], t[:1].roll(3, -1), t[:1].flip(-1)]) for t in example]
    return [one, tuple(turned)]


def _compare(
    model: nn.Module, inputs: tuple[Tensor, ...], results: list[np.ndarray], masks: dict[str, np.ndarray]
) -> Parity:
    decided: dict[str, list[Tensor]] = {}

    def given(name: str) -> Any:
        def hook(_gate: nn.Module, _args: tuple, output: Tensor) -> Tensor:
            decided.setdefault(name, []).append(output.as_subclass(Tensor))
            return torch.from_numpy(masks[name]).to(output)

        return hook

    leaves = _run(model, inputs, {name: given(name) for name in masks})
    several = {name for name, runs in decided.items() if len(runs) > 1}
    if several:
        # The graph tells one mask of a block that runs several times: what these decide is left to them.
        decided.clear()
        leaves = _run(model, inputs, {name: given(name) for name in masks.keys() - several})
    flipped = [np.mean(masks[name] != own.numpy()) for name, (own,) in decided.items()]
    errors = [_relative(a, b.numpy()) for a, b in zip(results, leaves, strict=True)]
    return Parity(max(errors, default=0.0), float(max(flipped, default=0.0)))


def _run(model: nn.Module, inputs: tuple[Tensor, ...], hooks: dict[str, Any]) -> list[Tensor]:
    """The tensors of a network's result, with a hook on each of these gates."""
    handles = [gate.register_forward_hook(hooks[n]) for n, gate in gates(model).items() if n in hooks]
    try:
        with torch.no_grad():
            return [v for v in _pytree.tree_leaves(model(*inputs)) if isinstance(v, Tensor)]
    finally:
        for handle in handles:
            handle.remove()


def _relative(got: np.ndarray, expected: np.ndarray) -> float:
    if got.shape != expected.shape:
        return float("inf")
    if got.size == 0:
        return 0.0
    a, b = got.astype(np.float64), expected.astype(np.float64)
    apart = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    error = float(apart.max() / max(scale, 1e-12))
    return error if error == error else float("inf")
