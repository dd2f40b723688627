"""Logits of 3x3 gates as a network's result, over sizes that fill no patch, in both precisions."""

from __future__ import annotations

import pytest
import torch
from tests.engine.networks import Lambda, conv_bn
from tests.engine.test_bfloat16 import CLOSE, HALF, LACKS
from tests.engine.test_networks import check
from torch import nn

import dynaconv as dc
from dynaconv.ops.mask_ops import mask_logits

SIZES = [(1, 1), (2, 3), (7, 7), (9, 29), (16, 15)]
needs_processor = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
DTYPES = [None, pytest.param(HALF, marks=needs_processor)]


def logits_of(channels: int, stride: int) -> nn.Module:
    """A stem, and the logits that a gate makes of its result."""
    gate = dc.nn.MaskUnit(channels, stride=stride)

    def forward(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
        bias = m.gate.linear.bias + m.gate.conv.bias
        return mask_logits(m.stem(x), m.gate.conv.weight, m.gate.linear.weight, bias, stride=stride)

    return Lambda(forward, stem=conv_bn(3, channels, act=nn.ReLU()), gate=gate).eval()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [5, 24, 49])
def test_logits_of_any_size(channels: int, stride: int, dtype: torch.dtype | None, seed: int) -> None:
    model = logits_of(channels, stride)
    for size in SIZES:
        x = torch.randn(3, 3, *size)
        fast = dc.compile(model, (x[:1],), dtype=dtype, measure=False)
        assert fast.plan.aten == [] and any(row["kernel"] == "gate" for row in fast.plan.steps)
        # The logits of a tiny map may cancel to less than what bfloat16 rounds of their terms.
        tolerance = 2e-5 if dtype is None else CLOSE if min(size) > 3 else 10 * CLOSE
        check(fast, model, x, tolerance)
        check(fast, model, x[:1], tolerance)
        # Neighbours and threads change nothing.
        expected = fast(x)
        for threads in (1, 3):
            fast.threads = threads
            assert torch.equal(fast(x), expected) and torch.equal(fast(x[1:2]), expected[1:2])
