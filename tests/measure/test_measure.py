"""From a calibrated network to results.json."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import dynaconv as dc
from dynaconv import measure
from dynaconv.data import load_dataset, make_loader


@pytest.fixture(scope="module")
def bundle():
    from dynaconv.data.scenes import load_scenes

    return load_scenes(32, 32, calibration_size=32, test_size=40)


@pytest.fixture(scope="module")
def model(bundle):
    torch.manual_seed(0)
    network = dc.models.CifarResNet(8, width=8, stem_stride=2, image_size=32)
    dc.dynamize_(network, dc.SpatialMasking(preset="paper"))
    dc.calibrate_(network.eval(), make_loader(bundle.calibration, 16, False), targets=(0.4, 0.6))
    return network


def test_points(model, bundle) -> None:
    dense = measure.dense_twin(model)
    measured = measure.measure_points(model, bundle, (0.4, 0.6), dense=dense, batch_sizes=(1, 8), rounds=2)
    assert measured["dense"]["macs"] == dc.profile(dense, torch.randn(1, 3, 32, 32)).dense_macs
    for point in measured["points"]:
        assert abs(point["ratio"] - point["target"]) < 0.1
        images, _ = bundle.test.__getitems__(list(range(len(bundle.test))))
        dc.set_budget_(model, point["target"])
        counted = dc.profile(model, images)
        assert point["executed_macs"] == pytest.approx(float(counted.executed_macs.mean()), rel=1e-6)
        assert set(point["latency"]) == {"1", "8"} and point["latency"]["8"]["ratio_median"] > 0
        area = float(((bundle.test.boxes[:, 2:] - bundle.test.boxes[:, :2]).prod(1)).sum()) / (40 * 32 * 32)
        mixed = area * point["density_inside"] + (1 - area) * point["density_outside"]
        assert mixed == pytest.approx(point["ratio"], abs=0.02)


def test_skipping_is_compared_block_by_block(model, bundle) -> None:
    images, _ = bundle.test.__getitems__([0, 1, 2])
    dc.set_budget_(model, 0.4)
    deviations = measure.compare_with_dense(model, images)
    assert set(deviations) == set(dc.gates(model)) and max(deviations.values()) < 1e-4


def test_gallery_and_results_round_trip(model, bundle, tmp_path) -> None:
    gallery = measure.build_gallery(model, bundle, (0.4, 0.6), count=6, dense=measure.dense_twin(model))
    assert gallery["images"].shape == (6, 32, 32, 3) and gallery["images"].dtype == np.uint8
    assert gallery["predictions"].shape == gallery["confidence"].shape == (2, 6)
    assert gallery["masks_1_0"].shape == (6, 16, 16) and gallery["ponder_0"].max() <= 3
    measured = measure.measure_points(model, bundle, (0.4, 0.6), latency=False)
    measure.write_results(tmp_path, title="t", command="c", bundle=bundle, measured=measured, gallery=gallery)
    data = measure.read_results(tmp_path)
    assert data["dataset"]["name"] == "scenes" and len(data["points"]) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gallery.npz", "results.json"]
    (tmp_path / "results.json").write_text('{"format": 1')
    with pytest.raises(ValueError, match="results.json is damaged"):
        measure.read_results(tmp_path)


def test_loaders_reach_the_same_pictures() -> None:
    a = load_dataset("scenes", image_size=32, train_size=4)
    assert torch.equal(a.train.labels, load_dataset("scenes", image_size=32, train_size=4).train.labels)
