"""The shipped recipes for Food-101, on a tiny folder of its form."""

from __future__ import annotations

import pytest
from tests.data.food import fake_food101

from dynaconv.train import fit, load_recipe
from dynaconv.train.logs import read_metrics

pytestmark = pytest.mark.needs("lightning", "timm")


def test_a_resnet50_trains_on_some_classes(tmp_path) -> None:
    changes = {
        "data.name": f"food101:{fake_food101(tmp_path, 15)}",
        "data.classes": "3",
        "data.image_size": "32",
        "data.batch_size": "13",
        "data.num_workers": "0",
        "trainer.epochs": "1",
        "trainer.precision": "fp32",
        "calibrate": "[0.5]",
    }
    words = [word for key, value in changes.items() for word in (f"--{key}", value)]
    static = {key: value for key, value in changes.items() if key != "calibrate"}
    dense = load_recipe("food101_resnet50_dense", [w for key, v in static.items() for w in (f"--{key}", v)])
    assert (dense.model.name, dense.data.classes, dense.masking) == ("timm:resnet50", 3, None)
    dynamic = load_recipe("food101_resnet50_dynconv", [*words, "--trainer.init_from", "null"])
    assert load_recipe("food101_resnet50_dynconv").trainer.init_from == "runs/food101-dense"
    lines: list[str] = []
    result = fit(dynamic, tmp_path / "run", progress=lines.append)
    assert result.model.num_classes == 3 and [row["target"] for row in result.calibration] == [0.5]
    *steps, epoch = read_metrics(tmp_path / "run" / "metrics.csv")
    assert len(steps) == 3 and all(float(row["loss"]) > 0 and row["ratio"] for row in steps)
    assert float(epoch["val_loss"]) > 0 and 0 <= float(epoch["val_accuracy"]) <= 1
    # A ResNet-50 has 4.09 GMACs at 224 pixels.
    assert 0 < float(epoch["val_gmacs"]) < 1.05 * 4.09 * (32 / 224) ** 2
    assert "GMACs" in lines[0]
