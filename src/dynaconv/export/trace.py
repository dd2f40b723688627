"""From a network to an ONNX graph of standard operators, with the values that its gates decide known by name."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.export import bins, computed, fused
from dynaconv.export.program import BATCH, HEIGHT, WIDTH, export, quiet
from dynaconv.export.subject import Watch, fixed_macs, fold_norms_, forget_executions_, prepare
from dynaconv.ops.channel_fusion.op import OP as CHANNEL_FUSION
from dynaconv.ops.dynamic_conv2d.op import OP as DYNAMIC_CONV

# What the graph is written in; newer versions are converted to at the end.
OLDEST_OPSET, NEWEST_OPSET = 18, 23


@dataclass
class Traced:
    """An ONNX graph (`onnx_ir.Model`) in work.

    outputs: how many results the network has; behind them the graph returns the mask of each gate in `gates`, until
    `drop_mask_outputs`. thresholds: block name -> initializer.
    """

    model: Any
    gates: list[str]
    thresholds: dict[str, Any]
    outputs: int
    dynamic_batch: bool
    dynamic_size: bool
    names: list[str] = field(default_factory=list)

    @property
    def graph(self) -> Any:
        """The main graph."""
        return self.model.graph

    @property
    def masks(self) -> dict[str, Any]:
        """Block name -> the value [N, ...] of 0 and 1 that its gate decided."""
        return dict(zip(self.gates, self.graph.outputs[self.outputs :], strict=True))

    def name_outputs(self) -> None:
        """Give the outputs their names, which passes may have taken."""
        for i, name in enumerate(self.names):
            _rename(self.graph, self.graph.outputs[i], name, i)

    def drop_mask_outputs(self) -> None:
        """Leave the network's own results as the only outputs."""
        del self.graph.outputs[self.outputs :]


def need_onnx() -> None:
    """Raise ImportError unless the packages that write ONNX are installed."""
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise _checks.export_not_installed(missing)


def trace(
    model: nn.Module,
    example: tuple[Tensor, ...],
    *,
    dynamic_batch: bool,
    dynamic_size: bool,
    count: bool = False,
) -> Traced:
    """The graph as torch.onnx writes it, inputs and outputs named, nothing optimised.

    Args:
        count: with the output `executed_macs` [N]; only where the size is fixed.
    Raises:
        ValueError: a network that cannot be exported. ImportError: onnx or onnxscript is missing.
    """
    need_onnx()
    copy = prepare(model, example)
    thresholds = [f"{name}.gate.threshold".lstrip(".") for name in gates(copy)]
    fold_norms_(copy)
    forget_executions_(copy)
    watch = Watch(copy, fixed_macs(prepare(model, example), example) if count else None)
    exported = export(copy, example, dynamic_batch, dynamic_size)
    single = not dynamic_batch and example[0].shape[0] == 1
    with quiet():
        exported = exported.run_decompositions(
            {
                DYNAMIC_CONV: computed.of_one_image if single else computed.of_any_batch,
                CHANNEL_FUSION: fused.of_any_batch,
                torch.ops.aten.adaptive_avg_pool2d.default: bins.adaptive_pool,
            }
        )
    graph = _to_onnx(exported, type(model).__name__)
    outputs = len(graph.graph.outputs) - len(watch.names)
    found = {name.removesuffix(".gate.threshold"): graph.graph.initializers.get(name) for name in thresholds}
    traced = Traced(
        graph,
        watch.names,
        {name: value for name, value in found.items() if value is not None},
        outputs,
        dynamic_batch,
        dynamic_size,
    )
    _name(traced, counted=count)
    return traced


def _to_onnx(exported: Any, name: str) -> Any:
    loud = logging.getLogger("onnxscript"), logging.getLogger("torch.onnx"), logging.getLogger("onnx_ir")
    levels = [logger.level for logger in loud]
    for logger in loud:
        logger.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), quiet():
            done = torch.onnx.export(
                exported,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=OLDEST_OPSET,
            )
    except Exception as error:
        cause = error.__cause__ or error
        raise _checks.export_no_onnx_form(name, cause) from error
    finally:
        for logger, level in zip(loud, levels, strict=True):
            logger.setLevel(level)
    return done.model


def _name(traced: Traced, counted: bool) -> None:
    """images (then input_1, ...), output (or output_0, ...), mask.BLOCK; axes batch, height, width."""
    import onnx_ir as ir

    graph, renamed = traced.graph, {}
    first = graph.inputs[0]
    for axis, name, free in (
        (0, BATCH, traced.dynamic_batch), (2, HEIGHT, traced.dynamic_size), (3, WIDTH, traced.dynamic_size)
    ):  # fmt: skip
        if free and isinstance(first.shape[axis], ir.SymbolicDim):
            renamed[first.shape[axis].value] = name
    for i, value in enumerate(graph.inputs):
        value.name = "images" if i == 0 else f"input_{i}"
    results = traced.outputs - counted
    traced.names = ["output"] if results == 1 else [f"output_{i}" for i in range(results)]
    traced.names += ["executed_macs"] * counted
    traced.name_outputs()
    for value in graph.inputs:
        value.shape = ir.Shape([renamed.get(getattr(d, "value", None), d) for d in value.shape])
    for node in graph:
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_dimension(d, renamed) for d in value.shape])


def _dimension(dim: Any, renamed: dict[str, str]) -> Any:
    """Symbols by their public names; what torch calculated from them stays unnamed."""
    if isinstance(dim, int):
        return dim
    return renamed.get(dim.value)


def _rename(graph: Any, value: Any, name: str, index: int) -> None:
    """Give an output its name, through a copy where the value is an input or two outputs are one."""
    import onnx_ir as ir

    taken = value.is_graph_input() or any(value is other for other in graph.outputs[:index])
    if taken or value.is_initializer():
        copy = ir.node("Identity", [value])
        graph.append(copy)
        copy.outputs[0].shape, copy.outputs[0].type = value.shape, value.type
        graph.outputs[index] = value = copy.outputs[0]
    value.name = name
