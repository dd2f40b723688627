from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

import dynaconv as dc


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p {i}.png")
    return folder


def test_folder_and_file(cli, trained, pictures, tmp_path) -> None:
    out = tmp_path / "explained"
    words = [
        "explain",
        trained,
        pictures,
        pictures / "p 0.png",
        "--target",
        "0.3",
        "0.7",
        "--out",
        out,
        "--json",
    ]
    data = cli(*words).json
    assert [(r["file"], r["target"]) for r in data["pictures"][:2]] == [("p 0.png", 0.3), ("p 0.png", 0.7)]
    assert len(data["pictures"]) == 6
    for row in data["pictures"]:
        assert row["prediction"] in [str(digit) for digit in range(10)]
        assert 0 < row["confidence"] <= 1 and 0 <= row["conditional_ratio"] <= 1
    assert (out / "explain.html").is_file() and data["page"] == str(out / "explain.html")
    assert len(list(out.glob("*.png"))) == 3


def test_text_and_a_broken_picture(cli, trained, pictures, tmp_path) -> None:
    (pictures / "torn.jpg").write_bytes(b"\xff\xd8 torn")
    answer = cli("explain", trained, pictures, "--out", tmp_path / "out", "--target", "0.5")
    assert answer.code == 0
    assert "p 1.png" in answer.out and "torn" not in answer.out
    assert "skipped" in answer.err and "torn.jpg" in answer.err
    cli("explain", trained, pictures, "--strict", "--out", tmp_path / "out").complains("torn.jpg")


def test_network_that_is_not_calibrated(cli, uncalibrated, pictures, tmp_path) -> None:
    cli("explain", uncalibrated, pictures).complains("does not say how its pictures are normalised")
    model = dc.load(uncalibrated)
    folder = dc.save(model, tmp_path / "net", metadata={"mean": [0.5] * 3, "std": [0.25] * 3})
    answer = cli("explain", folder, pictures)
    assert "as trained" in answer.out and "class " in answer.out
    assert (folder / "explain" / "explain.html").is_file()


def test_bad_input(cli, trained, pictures, tmp_path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    cli("explain", trained, tmp_path / "empty").complains("no readable picture")
    cli("explain", trained, tmp_path / "file").complains("no readable picture")
    cli("explain", trained, "nothing.png").complains("there is no picture 'nothing.png'")
    cli("explain", trained, pictures, "--target", "2").complains("must lie in (0, 1]")
    cli("explain", trained, pictures, "--out", tmp_path / "file").complains("it is a file")
    cli("explain", "dynconv_resnet8_scenes", pictures).complains("needs a trained network")


def test_static_network(cli, pictures, tmp_path) -> None:
    folder = dc.save(dc.create_model("resnet8_cifar"), tmp_path / "static")
    cli("explain", folder, pictures).complains("is static: it computes everything")


OTHERS = {
    "layer": dc.LayerGate(),
    "halting": dc.Halting(),
    "images": dc.Halting(level="image"),
    "channels": dc.ChannelGate(groups=4),
    "narrow": dc.Narrow(groups=4),
    "random": dc.RandomMasking(),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_what_other_gates_decided_is_shown(cli, kind: str, pictures, tmp_path) -> None:
    torch.manual_seed(0)
    arch = {"name": "resnet14_cifar", "width": 4, "num_classes": 3, "image_size": 32}
    model = dc.create_model(**arch)
    dc.dynamize_(model, OTHERS[kind])
    dc.calibrate_(model, [torch.randn(8, 3, 32, 32)], (0.4, 0.7))
    facts = {"classes": ["a", "b", "c"], "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3}
    dc.save(model, tmp_path / "run", arch=arch, metadata=facts)
    rows = cli("explain", tmp_path / "run", pictures, "--out", tmp_path / "out", "--json").json["pictures"]
    with np.load(tmp_path / "out" / "gallery.npz") as gallery:
        for t in range(2):
            masks = [gallery[f"masks_{t}_{b}"] for b in range(len(gallery["blocks"]))]
            assert {v for mask in masks for v in np.unique(mask).tolist()} <= {0, 1}
            if kind in ("layer", "images"):
                assert all(mask.reshape(2, -1).std(1).max() == 0 for mask in masks)
            if kind in ("channels", "narrow"):
                assert all(mask.shape == (2, 1, 4) for mask in masks)
                # As much is drawn as was computed: a convolution between masked maps costs the square.
                shares = np.stack([mask.mean((1, 2)) for mask in masks])
                executed = np.array([row["conditional_ratio"] for row in rows[t::2]])
                assert (shares.min(0) ** 2 <= executed + 1e-6).all() and (
                    executed <= shares.max(0) + 1e-6
                ).all()
    page = (tmp_path / "out" / "explain.html").read_text()
    assert ("drawn as stripes" in page) == (kind in ("channels", "narrow"))


@pytest.mark.needs("sklearn")
def test_keypoints_are_shown_with_what_is_known_of_them(cli, few_scenes, pictures, tmp_path) -> None:
    torch.manual_seed(0)
    arch = {"name": "hourglass1_scenes", "width": 8, "depth": 1}
    model = dc.create_model(**arch).eval()
    dc.dynamize_(model, dc.SpatialMasking(unit="conv1x1"), input_size=(3, 32, 32))
    dc.calibrate_(model, [torch.randn(8, 3, 32, 32)], (0.4, 0.7))
    names = ["top left", "top right", "bottom left", "bottom right", "centre"]
    facts = {"classes": names, "image_size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "metric": "PCK@0.2"}
    dc.save(model, tmp_path / "run", arch=arch, metadata={**facts, "dataset": "scenes_keypoints"})
    found = cli("explain", tmp_path / "run", pictures, "--out", tmp_path / "own", "--json").json["pictures"]
    assert [p["name"] for p in found[0]["points"]] == names and "right" not in found[0]
    assert all(-1 <= p[side] <= 33 for row in found for p in row["points"] for side in ("x", "y"))
    words = ("explain", tmp_path / "run", "test:2", "--out", tmp_path / "out")
    rows = cli(*words, "--json").json["pictures"]
    assert all(0 <= row["right"] <= row["known"] == 5 for row in rows)
    with np.load(tmp_path / "out" / "gallery.npz") as gallery:
        assert gallery["points"].shape == (2, 2, 5, 2) and gallery["truth"].shape == (2, 5, 4)
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    page = (tmp_path / "out" / "explain.html").read_text()
    assert "rings: where they are" in page and "class 0" not in page
    cli("eval", tmp_path / "run", "--times")
    with np.load(tmp_path / "run" / "gallery.npz") as gallery:
        assert gallery["points"].shape[0] == 2 and gallery["truth"].shape[1:] == (5, 4)
        assert gallery["boxes"].shape == (len(gallery["points"][0]), 4)
    cli("report", tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "rings: where they are" in page and "has no gallery" not in page and '"keypoints"' in page
    assert (tmp_path / "run" / "figures" / "gallery.png").stat().st_size > 5000
    cli("explain", tmp_path / "run", "test:2", pictures).complains(
        "test:2 stands alone: name either image files"
    )
    cli("explain", tmp_path / "run", "test:0").complains("test:N")
