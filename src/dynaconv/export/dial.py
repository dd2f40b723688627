"""The budget dial as an input of the graph, and what the network spends as outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import nn

from dynaconv import _checks
from dynaconv.convert import gates
from dynaconv.export.graph import Writer, constant
from dynaconv.export.trace import Traced

DIALS = ("budget", "gates")
REPORTS = ("densities", "executed_macs")
BUDGET, THRESHOLDS = "budget_threshold", "thresholds"


def check_dial(model: nn.Module, dial: str | None, report: tuple[str, ...]) -> str | None:
    """The dial that the graph gets: None where there is nothing to turn.

    Raises:
        ValueError: an unknown word, one dial for thresholds that differ, or reports on gates that are not there.
    """
    if dial is not None:
        _checks.one_of("dial", dial, DIALS)
    for name in report:
        _checks.one_of("report", name, REPORTS)
    found = gates(model)
    if not found:
        if report:
            raise _checks.export_no_gates(f"report={report}")
        return None
    values = [float(gate.threshold) for gate in found.values()]
    if dial == "budget" and min(values) != max(values):
        raise _checks.export_mixed_thresholds(min(values), max(values))
    return dial


def add_dial(traced: Traced, dial: str | None) -> None:
    """Let an input decide instead of the thresholds that were set: one for all gates, or one for each."""
    if dial is None or not traced.thresholds:
        return
    import onnx_ir as ir

    graph, count = traced.graph, len(traced.thresholds)
    name, shape = (BUDGET, ()) if dial == "budget" else (THRESHOLDS, (count,))
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
    graph.inputs.append(value)
    for i, threshold in enumerate(traced.thresholds.values()):
        one = value
        if dial == "gates":
            write = Writer(graph, graph[0])
            one = write("Gather", value, write.constant(np.array(i, np.int64)), shape=(), axis=0)
        threshold.replace_all_uses_with(one)
        del graph.initializers[threshold.name]


def add_densities(traced: Traced) -> None:
    """The output `densities` [N, gates]: for each image, the share of what each gate decided that is open."""
    import onnx_ir as ir

    graph = traced.graph
    end = ir.node("Identity", [graph.outputs[0]])
    graph.append(end)
    write, columns = Writer(graph, end), []
    for mask in traced.masks.values():
        columns.append(_open_share(write, mask))
    y = write("Concat", *columns, axis=1, shape=[graph.inputs[0].shape[0], len(columns)])
    y.name = "densities"
    graph.outputs.insert(traced.outputs, y)
    traced.outputs += 1
    traced.names.append(y.name)
    graph.remove(end, safe=True)


def _open_share(write: Writer, mask: Any) -> Any:
    """Mean of a mask [N, ...] of each image, [N, 1]."""
    made = mask.producer()
    if made is not None and made.op_type == "Slice" and _of_channels(made):
        # One channel of many: means first, because they stay in the layout in which the channels were made.
        means = write("GlobalAveragePool", made.inputs[0])
        return write("Reshape", write("Slice", means, *made.inputs[1:]), write.integers(-1, 1))
    mean = write("ReduceMean", mask, write.integers(*range(1, len(mask.shape))), keepdims=0)
    return write("Unsqueeze", mean, write.integers(1))


def _of_channels(node: Any) -> bool:
    axes = constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is not None and axes.tolist() == [1] and len(node.inputs) == 4
