"""`export.program`: torch.export programs of every kind of network, for any batch, loadable without dynaconv."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import dynaconv as dc
from dynaconv.testing import force_masks

CONFIGS = {
    "spatial": lambda: dc.SpatialMasking(granularity=2),
    "kernel": lambda: dc.DYConv(),
    "both": lambda: (dc.SpatialMasking(), dc.CondConv()),
}


def build(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, CONFIGS[kind]())
    return model.eval()


@pytest.mark.parametrize("kind", CONFIGS)
def test_programs_serve_any_batch(kind) -> None:
    model = build(kind)
    exported = dc.export.program(model, (torch.randn(1, 3, 16, 16),), dynamic_size=kind == "spatial")
    assert not any("dynaconv" in str(node.target) for node in exported.graph.nodes)
    run = exported.module()
    for shape in [(1, 3, 16, 16), (5, 3, 16, 16)] + ([(2, 3, 20, 14)] if kind == "spatial" else []):
        x = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)


def test_forced_masks_stay_behind() -> None:
    model, x = build("spatial"), torch.randn(2, 3, 16, 16)
    with force_masks(model, 0.0):
        exported = dc.export.program(model, (x,), dynamic_batch=False)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), model(x), rtol=1e-4, atol=1e-5)


def test_a_saved_program_needs_no_dynaconv(tmp_path) -> None:
    model, x = build("spatial"), torch.randn(2, 3, 16, 16)
    path = dc.export.save_program(dc.export.program(model, (x,)), tmp_path / "m.pt2", {"dynaconv.json": "{}"})
    torch.save((x, model(x).detach()), tmp_path / "pair.pt")
    code = f"""
import sys, torch
sys.modules["dynaconv"] = None
x, y = torch.load({str(tmp_path / "pair.pt")!r})
facts = {{"dynaconv.json": ""}}
run = torch.export.load({str(path)!r}, extra_files=facts).module()
assert facts["dynaconv.json"] == "{{}}", facts
torch.testing.assert_close(run(x), y, rtol=1e-4, atol=1e-5)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch) -> None:
    exported = dc.export.program(build("spatial"), (torch.randn(2, 3, 16, 16),))

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dc.export.save_program(exported, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_exported() -> None:
    class Counts(torch.nn.Module):
        def forward(self, x):
            return x * int(x.shape[0] == 2) if x.shape[0] < 3 else x

    class Looks(torch.nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    x = torch.randn(2, 3, 8, 8)
    with pytest.raises(
        ValueError,
        match="Counts cannot be exported with dynamic_batch: .* export it with dynamic_batch=False",
    ):
        dc.export.program(Counts().eval(), (x,))
    with pytest.raises(ValueError, match="torch.export cannot follow the forward of Looks"):
        dc.export.program(Looks().eval(), (x,))
    with pytest.raises(ValueError, match="resnet|layer1|the model is in training mode"):
        dc.export.program(build("spatial").train(), (x,))
    with pytest.raises(TypeError, match="got a str in it"):
        dc.export.program(build("spatial"), (x, "y"))
