"""The dense task from recipe to budgets: training, calibration, evaluation and the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dynaconv as dc
from dynaconv.cli.main import main
from dynaconv.data.keypoints import load_scene_keypoints
from dynaconv.train import evaluate, fit

pytestmark = pytest.mark.needs("lightning", "sklearn")
RECIPE = {
    "model": {"name": "hourglass1_scenes", "options": {"width": 8, "depth": 1}},
    "data": {
        "name": "scenes_keypoints",
        "image_size": 32,
        "train_size": 96,
        "batch_size": 16,
        "augment": False,
    },
    "masking": {"unit": "conv1x1"},
    "budget": {"target": 0.5, "alpha": 0.01},
    "optim": {"name": "adam", "lr": 5e-3, "weight_decay": 0.0, "schedule": "constant"},
    "trainer": {"epochs": 2, "best": "last"},
    "calibrate": [0.4, 0.7],
}


def test_from_recipe_to_budget(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    bundle = load_scene_keypoints(32, 96, calibration_size=40, test_size=24, progress=False, augment=False)
    result = fit(RECIPE, tmp_path / "run", progress=False, bundle=bundle)
    assert result.metric == "PCK@0.2" and len(result.history) == 2
    assert result.history[1]["train_loss"] < result.history[0]["train_loss"]
    assert [row["target"] for row in result.calibration] == [0.4, 0.7]
    assert all(abs(row["error"]) < 0.05 for row in result.calibration)
    dc.set_budget_(result.model, 0.7)
    found = evaluate(result.model, bundle.test)
    assert found["metric"] == "PCK@0.2" and 0 <= found["accuracy"] <= 1 and 0.5 < found["ratio"] < 0.9
    with torch.no_grad():
        x = bundle.test.__getitems__([0, 1])[0]
        fast = dc.compile(result.model, (x,), measure=False)
        assert torch.allclose(fast(x), result.model(x), atol=1e-4)
    again = dc.load(tmp_path / "run" / "model")
    dc.set_budget_(again, 0.7)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), result.model(x))

    assert main(["eval", str(tmp_path / "run"), "--limit", "20", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["metric"] == "PCK@0.2" and [row["target"] for row in data["rows"]] == [0.4, 0.7]
    assert data["rows"][0]["executed_macs"] < data["rows"][1]["executed_macs"]
    assert main(["eval", str(tmp_path / "run"), "--limit", "20"]) == 0
    assert "PCK@0.2" in capsys.readouterr().out
    pages = tmp_path / "explained"
    assert main(["explain", str(tmp_path / "run"), "test:2", "--out", str(pages)]) == 0
    assert "rings: where they are" in (pages / "explain.html").read_text()


def test_a_perfect_network_is_judged_perfect() -> None:
    bundle = load_scene_keypoints(32, 8, calibration_size=1, test_size=8, progress=False)
    truth = bundle.test.labels

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return bundle.test.task.heat_maps(truth[: len(x)], (8, 8))[:, None]

    found = evaluate(Oracle(), bundle.test)
    assert found["accuracy"] == 1.0 and found["loss"] == 0.0
