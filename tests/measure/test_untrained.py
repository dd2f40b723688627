"""Untrained networks that checks can be made on."""

from __future__ import annotations

import torch

import dynaconv as dc
from dynaconv.measure.untrained import settle_norms_


def test_routers_do_not_blow_rounding_up() -> None:
    torch.manual_seed(0)
    model = settle_norms_(
        dc.create_model("odconv4_resnet18", num_classes=10), torch.randn(4, 3, 64, 64)
    ).double()
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, nudged = model(x), model(x * (1 + 1e-9))
    assert (nudged - expected).abs().max() < 1e-6 * expected.abs().max()
    assert expected.std() > 0.1
