"""Which positions listed rows need, against transposed convolutions."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dynaconv.export import tables
from dynaconv.export.graph import Writer

ir = pytest.importorskip("onnx_ir")
ort = pytest.importorskip("onnxruntime")

# kernel, stride, pads (top, left, bottom, right), dilation, height and width; and whether a maximum is enough.
GEOMETRIES = [
    (3, 1, (1, 1, 1, 1), 1, (7, 9), True),
    (3, 2, (1, 1, 1, 1), 1, (8, 12), True),
    (3, 2, (1, 1, 1, 1), 1, (7, 9), True),
    (3, 2, (0, 0, 1, 1), 1, (8, 9), True),
    (3, 2, (0, 0, 0, 0), 1, (8, 9), False),
    (5, 2, (2, 2, 2, 2), 1, (9, 8), True),
    (7, 4, (3, 3, 3, 3), 1, (13, 16), True),
    (2, 2, (0, 0, 0, 0), 1, (8, 6), True),
    (2, 2, (0, 0, 0, 0), 1, (9, 7), False),
    (1, 2, (0, 0, 0, 0), 1, (8, 7), False),
    (3, 2, (2, 2, 2, 2), 2, (9, 8), False),
    (4, 3, (1, 2, 2, 1), 1, (10, 11), False),
]


@pytest.mark.parametrize(("kernel", "stride", "pads", "dilation", "size", "maximum"), GEOMETRIES)
def test_needed_positions_are_what_open_outputs_read(kernel, stride, pads, dilation, size, maximum) -> None:
    top, left, bottom, right = pads
    reach = dilation * (kernel - 1)
    out = [(n + p - reach - 1) // stride + 1 for n, p in zip(size, (top + bottom, left + right), strict=True)]
    value = ir.Value(name="mask", shape=ir.Shape([2, 1, *out]), type=ir.TensorType(ir.DataType.FLOAT))
    last = ir.node("Identity", [value])
    graph = ir.Graph([value], last.outputs, nodes=[last], opset_imports={"": 20}, name="g")
    stage = SimpleNamespace(kernel=(kernel,) * 2, stride=(stride,) * 2, pads=pads, dilation=(dilation,) * 2)
    grids = tables.Grid(None, *size), tables.Grid(None, *out)
    last.replace_input_with(0, tables.needed(Writer(graph, last), value, stage, *grids))
    last.outputs[0].name, last.outputs[0].type = "needed", ir.TensorType(ir.DataType.FLOAT)
    assert any(node.op_type == "ConvTranspose" for node in graph) != maximum
    file = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])

    for density in (0.0, 0.15, 0.6, 1.0):
        mask = (torch.rand(2, 1, *out, generator=torch.Generator().manual_seed(0)) < density).float()
        spread = F.conv_transpose2d(mask, torch.ones(1, 1, kernel, kernel), stride=stride, dilation=dilation)
        expected = torch.zeros(2, 1, size[0] + top + bottom, size[1] + left + right)
        expected[:, :, : spread.shape[2], : spread.shape[3]] = (spread > 0).float()
        expected = expected[:, :, top : top + size[0], left : left + size[1]]
        found = session.run(None, {"mask": mask.numpy()})[0]
        assert np.array_equal(found, expected.numpy())
