from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from tests.train.synthetic import recipe

import dynaconv as dc
from dynaconv.train import load_recipe
from dynaconv.train.callbacks import seed_everything
from dynaconv.train.logs import MetricsFile, read_metrics
from dynaconv.train.module import DynaconvModule
from dynaconv.train.optim import build_optimizer, lr_factor
from dynaconv.train.precision import device_of, lightning_precision, native_bf16
from dynaconv.train.recipe import OptimSection


def test_learning_rate_schedules():
    cosine = OptimSection(schedule="cosine", warmup_epochs=1)
    assert [lr_factor(cosine, s, 4, 12) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert lr_factor(cosine, 12, 4, 12) == pytest.approx(0)
    steps = OptimSection(schedule="multistep", milestones=[2, 3], gamma=0.1)
    assert [round(lr_factor(steps, s, 10, 40), 3) for s in (0, 19, 20, 30)] == [1, 1, 0.1, 0.01]
    assert lr_factor(OptimSection(schedule="constant"), 7, 4, 12) == 1


def test_gates_are_a_group_of_their_own():
    model = dc.create_model("dynconv_resnet8_cifar")
    budget = dc.MacBudget(model, 0.5, total_steps=1)
    section = OptimSection(lr=0.1, weight_decay=0.01, gate_lr_multiplier=0.5, gate_weight_decay=0.0)
    network, gates = build_optimizer(section, model, budget).param_groups
    assert (network["lr"], network["weight_decay"], gates["lr"], gates["weight_decay"]) == (
        0.1,
        0.01,
        0.05,
        0.0,
    )
    assert sum(len(g["params"]) for g in (network, gates)) == len(list(model.parameters()))
    assert isinstance(build_optimizer(OptimSection("adamw"), model), torch.optim.AdamW)
    assert isinstance(build_optimizer(OptimSection("adam"), model, budget), torch.optim.Adam)


def test_which_epoch_is_best():
    model = dc.create_model("dynconv_resnet8_cifar", num_classes=4)
    within = {"epoch": 1, "val_accuracy": 0.5, "ratio": 0.52}
    above = {"epoch": 2, "val_accuracy": 0.9, "ratio": 0.53}
    far = {"epoch": 3, "val_accuracy": 0.99, "ratio": 0.8}
    order = {"budget": [far, above, within], "accuracy": [within, above, far], "last": [within, above, far]}
    for best, expected in order.items():
        module = DynaconvModule(model, load_recipe(recipe(trainer={"best": best})), 3)
        assert sorted([within, above, far], key=module.score) == expected


def test_precision():
    assert lightning_precision("fp32", "cpu") == "32-true"
    assert lightning_precision("bf16", "cpu") == "bf16-mixed"
    assert lightning_precision("auto", "cpu") == ("bf16-mixed" if native_bf16() else "32-true")


def test_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of("auto") == device_of("cpu") == "cpu"
    with pytest.raises(ValueError, match="needs 2 CUDA"):
        device_of("gpu", 2)


def test_seeds_cover_all_generators():
    def draw(*key):
        seed_everything(*key)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw(0, 1, 0) == draw(0, 1, 0)
    assert all(a != b for a, b in zip(draw(0, 1, 0), draw(0, 2, 0), strict=True))


def test_metrics_file_continues_after_a_cut(tmp_path):
    path = tmp_path / "metrics.csv"
    first = MetricsFile(path, ["b"])
    for step in range(4):
        first.log_metrics({"epoch": 1 + step // 2, "loss": 0.5, "density/b": 0.25}, step)
    first.finalize("ok")
    path.write_text(path.read_text() + "2,4,0.0")
    second = MetricsFile(path, ["b"], epochs_done=1)
    second.log_metrics({"epoch": 2, "loss": 0.1}, 2)
    second.finalize("ok")
    rows = read_metrics(path)
    assert [(row["epoch"], row["step"], row["loss"]) for row in rows] == [
        ("1", "0", "0.5"),
        ("1", "1", "0.5"),
        ("2", "2", "0.1"),
    ]
    assert path.read_text().count("epoch") == 1


def test_reading_recipes_does_not_import_lightning():
    code = "import sys, dynaconv.train as t; t.load_recipe('scenes_dynconv'); assert 'lightning' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
