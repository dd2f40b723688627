"""Published networks of every dynamic family, compiled: nothing runs through ATen, and files give the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.convert.networks import randomise_norms
from tests.engine.networks import exact_convolutions, poisoned
from tests.engine.test_networks import check

import dynaconv as dc
from dynaconv.engine import load

OWN = [f"{family}_resnet8_cifar" for family in ("condconv8", "dcd", "dyconv4", "dynet", "odconv1")]
TORCHVISION = ["dcd_mobilenetv2_035", "weightnet_shufflenetv2_050"]
NAMES = [
    *OWN,
    "dymobile_050",
    *(pytest.param(n, marks=pytest.mark.needs("torchvision")) for n in TORCHVISION),
]


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_through_aten(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = randomise_norms(dc.create_model(name, num_classes=7)).eval()
    x = torch.randn(3, 3, 32, 32)
    fast = dc.compile(model, (x,), measure=False)
    assert fast.plan.aten == []
    fast.verify((x,), tolerance=1e-5)
    for n in (1, 8):
        check(fast, model, torch.randn(n, 3, 32, 32))
    if name in OWN:
        assert torch.equal(load(fast.save(tmp_path / "fast.plan"))(x), fast(x))
        with exact_convolutions():
            check(poisoned(model, x), model, x)
