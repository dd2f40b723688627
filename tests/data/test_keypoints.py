"""Keypoints: heat-maps and back, PCK, the scenes with corners, MPII's annotations in both forms."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from dynaconv.data import KeypointImages, Keypoints, load_dataset, make_loader, task_of
from dynaconv.data.keypoints import load_scene_keypoints
from dynaconv.data.mpii import JOINTS, read_annotations
from dynaconv.data.tasks import known_points


def labels(seed: int = 0, n: int = 3, k: int = 4, side: float = 20.0) -> torch.Tensor:
    points = torch.rand(n, k, 2, generator=torch.Generator().manual_seed(seed)) * 50 + 7
    return known_points(points, [side] * n)


def test_points_come_back_from_their_heat_maps() -> None:
    task, truth = Keypoints(alpha=0.2), labels()
    maps = task.heat_maps(truth, (16, 16))
    assert maps.shape == (3, 4, 16, 16) and float(maps.max()) <= 1
    # Half a pixel of the map, less what the higher neighbour tells.
    assert float((task.points(maps) - truth[:, :, :2].double()).abs().max()) <= 2.0
    assert task.judge(maps[:, None], truth) == (12.0, 12)
    assert float(task.loss(maps[:, None].expand(-1, 2, -1, -1, -1), truth)) == 0.0


def test_pck_against_distances_by_hand() -> None:
    truth = known_points(torch.tensor([[[21.5, 21.5], [21.5, 21.5], [37.5, 9.5]]]), [20.0])
    maps = torch.zeros(1, 1, 3, 16, 16)
    maps[0, 0, 0, 5, 5] = 1  # (5 + 0.5) * 4 - 0.5 = 21.5: right on it.
    maps[0, 0, 1, 5, 7] = 1  # 8 pixels off.
    maps[0, 0, 2, 2, 8] = 1  # (33.5, 9.5): 4 pixels off, just right for 0.2 * 20.
    assert Keypoints(alpha=0.2).judge(maps, truth) == (2.0, 3)
    assert Keypoints(alpha=0.19).judge(maps, truth) == (1.0, 3)
    truth[0, 1, 2] = 0  # Not annotated.
    assert Keypoints(alpha=0.2).judge(maps, truth) == (2.0, 2)
    assert Keypoints(alpha=0.2).metric == "PCK@0.2" and Keypoints(0.5, length="h").metric == "PCKh@0.5"


def test_unknown_keypoints_carry_no_loss() -> None:
    truth, outputs = labels(n=2, k=2), torch.randn(2, 1, 2, 16, 16, requires_grad=True)
    truth[:, 1, 2] = 0
    Keypoints().loss(outputs, truth).backward()
    assert not outputs.grad[:, :, 1].any() and outputs.grad[:, :, 0].any()
    with pytest.raises(ValueError, match="label_smoothing is for classes"):
        Keypoints().loss(outputs, truth, 0.1)
    with pytest.raises(ValueError, match=r"heat-maps \[N, stacks, 2, h, w\], got \[2, 10\]"):
        Keypoints().loss(torch.zeros(2, 10), truth)


@pytest.mark.needs("sklearn")
def test_scenes_with_corners() -> None:
    sizes = {"image_size": 48, "train_size": 40, "calibration_size": 8, "test_size": 8, "progress": False}
    bundle = load_scene_keypoints(**sizes)
    part = bundle.test
    assert isinstance(part, KeypointImages) and len(bundle.classes) == 5
    x0, y0, x1, y1 = part.boxes.float().unbind(1)
    assert torch.equal(part.labels[:, 0, :2], torch.stack((x0, y0), 1))
    assert torch.equal(part.labels[:, 3, :2], torch.stack((x1 - 1, y1 - 1), 1))
    assert torch.equal(part.labels[:, 4, 0], (x0 + x1 - 1) / 2)
    again = load_scene_keypoints(**sizes)
    assert torch.equal(again.train.images, bundle.train.images)
    loader = make_loader(bundle.test, 4, shuffle=False)
    images, truth = next(iter(loader))
    assert images.shape == (4, 3, 48, 48) and truth.shape == (4, 5, 4)
    assert task_of(loader) is part.task and task_of([]).metric == "accuracy"


@pytest.mark.needs("sklearn")
def test_shifts_move_pictures_and_keypoints_together() -> None:
    bundle = load_scene_keypoints(48, 12, calibration_size=1, test_size=1, progress=False)
    train = bundle.train
    train.set_epoch(3)
    # Mark each keypoint's pixel and see where the marks go.
    xy = train.labels[:, :4, :2].long()
    train.images.zero_()
    for i in range(12):
        train.images[i, :, xy[i, :, 1], xy[i, :, 0]] = 255
    images, truth = train.__getitems__(list(range(12)))
    assert not torch.equal(truth[:, :, :2], train.labels[:, :, :2])
    moved = truth[:, :4].round().long()
    for i in range(12):
        for x, y, known, _ in moved[i].tolist():
            if known:
                assert float(images[i, 0, y, x]) > 1.5


def people(root: Path, count: int = 12) -> list[dict]:
    from PIL import Image

    generator = np.random.Generator(np.random.PCG64(0))
    (root / "images").mkdir(parents=True)
    rows = []
    for i in range(count):
        name = f"{i:03d}.png"
        pixels = np.zeros((120, 160, 3), dtype=np.uint8)
        joints = np.column_stack([generator.integers(50, 110, 16), generator.integers(25, 95, 16)])
        for x, y in joints:
            pixels[y - 1 : y + 2, x - 1 : x + 2] = 255
        Image.fromarray(pixels).save(root / "images" / name)
        # Annotations count from 1.
        rows.append({"image": name, "center": [81, 61 - 15 * 0.5], "scale": 0.5, "joints": (joints + 1).tolist(),
                     "joints_vis": [1] * 15 + [0]})  # fmt: skip
    return rows


@pytest.mark.needs("PIL")
def test_mpii_annotations_in_both_forms(tmp_path: Path) -> None:
    rows = people(tmp_path)
    other = [
        {
            "img_paths": r["image"], "objpos": r["center"], "scale_provided": r["scale"], "isValidation": float(i >= 9),
            "joint_self": [[*p, 1.0] if v else [0, 0, 0] for p, v in zip(r["joints"], r["joints_vis"], strict=True)],
        }
        for i, r in enumerate(rows)
    ]  # fmt: skip
    (tmp_path / "mpii_annotations.json").write_text(json.dumps(other))
    first = read_annotations(tmp_path)
    (tmp_path / "mpii_annotations.json").unlink()
    (tmp_path / "annot").mkdir()
    (tmp_path / "annot" / "train.json").write_text(json.dumps(rows[:9]))
    (tmp_path / "annot" / "valid.json").write_text(json.dumps(rows[9:]))
    second = read_annotations(tmp_path)
    for a, b in zip(first, second, strict=True):
        assert a.paths == b.paths and np.array_equal(a.known, b.known) and np.allclose(a.sides, b.sides)
        assert np.allclose(a.centres, b.centres) and np.allclose(a.joints[:, :15], b.joints[:, :15])
        assert not a.known[:, 15].any()

    bundle = load_dataset(f"mpii:{tmp_path}", image_size=128)
    assert bundle.classes == JOINTS and (len(bundle.train), len(bundle.calibration), len(bundle.test)) == (
        8,
        1,
        3,
    )
    assert bundle.test.task.metric == "PCKh@0.5"
    # Joints are white on black: there they must be after cutting out, flipping, turning and scaling.
    for part, whole in ((bundle.test, True), (bundle.train, False)):
        for epoch in range(1 if whole else 3):
            part.set_epoch(epoch)
            pixels = part.images_uint8(range(len(part)))
            _, truth = part.__getitems__(list(range(len(part))))
            seen = 0
            for i in range(len(part)):
                for x, y, known, _ in truth[i].tolist():
                    if known:
                        seen += 1
                        assert int(pixels[i, 0, round(y), round(x)]) > 60
            assert seen >= (40 if whole else 60)
            assert not whole or bool((truth[:, :15, 2] == 1).all())


@pytest.mark.needs("PIL")
def test_mpii_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither mpii_annotations.json nor annot/train.json"):
        read_annotations(tmp_path)
    rows = people(tmp_path, 2)
    (tmp_path / "annot").mkdir()
    (tmp_path / "annot" / "valid.json").write_text(json.dumps(rows))
    train = tmp_path / "annot" / "train.json"
    for text, words in [
        ("{", "is no JSON file"),
        ("3", "must hold a list of people"),
        ("[]", "has nobody"),
        (json.dumps([{**rows[0], "scale": 0}]), "person 0 is not in a form"),
        (json.dumps([{"image": "a.png"}]), "person 0 is not in a form"),
    ]:
        train.write_text(text)
        with pytest.raises(ValueError, match=words):
            read_annotations(tmp_path)
    train.write_text(json.dumps([{**rows[0], "image": "gone.png"}]))
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_annotations(tmp_path)
