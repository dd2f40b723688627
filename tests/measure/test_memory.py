"""Peak memory in a process of its own."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from dynaconv.measure import memory


class Wide(nn.Module):
    """40 MB of weights, and 40 MB more that only exist while it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10_000_000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + (self.weight + 1).sum()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.needs("timm")
def test_weights_and_what_a_run_adds(monkeypatch) -> None:
    monkeypatch.setenv("PYTHONPATH", ":".join([p for p in sys.path if p]))
    found = memory.peak_memory(Wide(), torch.randn(1, 3, 4, 4), threads=1, names=["eager"])
    assert 75 < found["eager"] < 110


def test_what_cannot_be_measured_says_why(monkeypatch) -> None:
    monkeypatch.setattr(memory.runtimes, "no_onnxruntime", lambda: "needs onnxruntime")
    found = memory.peak_memory(
        nn.Flatten(), torch.randn(1, 3, 4, 4), threads=1, names=["dynaconv", "onnxruntime"]
    )
    assert found == {"onnxruntime": "failed: RuntimeError: needs onnxruntime"}
