"""Data sets: the same everywhere, honest about what they skip, reproducible by (seed, epoch, index)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.data.food import fake_food101

from dynaconv.data import folders, list_datasets, load_dataset, load_image, make_loader
from dynaconv.data._scene_drawing import _digit_alpha, _line_alpha, words_per_scene
from dynaconv.data._scene_words import SceneWords
from dynaconv.data.augment import Augmentation
from dynaconv.data.loader import EpochSampler
from dynaconv.data.scenes import _digit_pools, load_scenes

# Position-weighted sum of the pixels of the first three training scenes at 48 pixels.
CHECKSUM = 315887575


@pytest.fixture(scope="module")
def scenes():
    return load_scenes(48, 40, calibration_size=20, test_size=20)


def test_scenes_are_the_same_on_every_machine(scenes) -> None:
    pixels = scenes.train.images_uint8([0, 1, 2]).long()
    weights = torch.arange(pixels.numel()) % 251
    assert int((pixels.flatten() * weights).sum()) == CHECKSUM
    assert torch.equal(
        load_scenes(48, 10, calibration_size=1, test_size=1).train.images, scenes.train.images[:10]
    )
    other = load_scenes(48, 10, seed=1, calibration_size=1, test_size=1)
    assert not torch.equal(other.train.images, scenes.train.images[:10])


def test_boxes_hold_the_object(scenes) -> None:
    for part in (scenes.train, scenes.calibration, scenes.test):
        x0, y0, x1, y1 = part.boxes.unbind(1)
        assert bool(((x0 >= 0) & (y0 >= 0) & (x1 <= 48) & (y1 <= 48) & (x1 > x0) & (y1 > y0)).all())
        heights = (y1 - y0).float() / 48
        assert 0.2 < float(heights.min()) and float(heights.max()) < 0.5
    assert set(scenes.train.labels.tolist()) <= set(range(10))


@pytest.mark.parametrize("share", [0.25, 0.04, 0.01])
def test_the_object_covers_the_share_that_was_asked_for(share: float) -> None:
    drawn = load_scenes(96, 60, calibration_size=1, test_size=1, object_share=share, progress=False)
    x0, y0, x1, y1 = drawn.train.boxes.double().unbind(1)
    assert float(((x1 - x0) * (y1 - y0)).mean()) / 96**2 == pytest.approx(share, rel=0.15)
    assert bool(((x0 >= 0) & (y0 >= 0) & (x1 <= 96) & (y1 <= 96)).all())
    # Only sizes change: the same digits on the same backgrounds, one pixel in two or more as before.
    mixed = load_scenes(96, 60, calibration_size=1, test_size=1, progress=False)
    assert torch.equal(drawn.train.labels, mixed.train.labels)
    assert float((drawn.train.images == mixed.train.images).float().mean()) > 0.5


def test_object_shares_that_cannot_be_drawn() -> None:
    with pytest.raises(
        ValueError, match="leaves a digit 4 pixels at image_size 32.*choose image_size 64 or more"
    ):
        load_scenes(32, 1, object_share=0.01)
    assert len(load_scenes(64, 1, calibration_size=1, test_size=1, object_share=0.01).train) == 1
    with pytest.raises(ValueError, match=r"must lie in \(0, 0.3\], got 0.5"):
        load_scenes(96, 1, object_share=0.5)
    with pytest.raises(ValueError, match="object_share is an option of scenes"):
        load_dataset("scenes_keypoints", object_share=0.1)


def test_no_digit_is_in_two_splits() -> None:
    pools = _digit_pools()
    seen = [{p.tobytes() for p in pool.pictures} for pool in pools.values()]
    assert sum(len(pool.pictures) for pool in pools.values()) == 1797
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_batches_are_normalised_and_channels_last(scenes) -> None:
    images, labels = scenes.test.__getitems__([3, 1])
    assert images.shape == (2, 3, 48, 48) and images.is_contiguous(memory_format=torch.channels_last)
    raw = scenes.test.images_uint8([3, 1]).float() / 255
    torch.testing.assert_close(images.contiguous(), (raw - 0.5) / 0.25, rtol=1e-5, atol=1e-5)
    image, label = scenes.test[1]
    assert torch.equal(image, images[1]) and label == int(labels[1])


def test_augmentation_follows_from_seed_epoch_and_index() -> None:
    images = torch.arange(4 * 3 * 8 * 8, dtype=torch.uint8).view(4, 3, 8, 8)
    one, two = Augmentation(2, True, seed=3), Augmentation(2, True, seed=3)
    for augment in (one, two):
        augment.set_epoch(5, 100)
    whole = one(images, [10, 20, 30, 40])
    assert torch.equal(two(images[2:3], [30]), whole[2:3])
    one.set_epoch(6, 100)
    assert not torch.equal(one(images, [10, 20, 30, 40]), whole)


def test_order_follows_from_seed_and_epoch_and_shares_are_disjoint(scenes) -> None:
    def order(epoch: int, rank: int = 0, world_size: int = 1) -> list[int]:
        loader = make_loader(scenes.train, 8, True, seed=4, rank=rank, world_size=world_size)
        loader.sampler.set_epoch(epoch)
        return list(loader.sampler)

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(40))
    shares = [order(1, rank, 2) for rank in (0, 1)]
    assert len(shares[0]) == len(shares[1]) == 20 and not set(shares[0]) & set(shares[1])
    batches = list(make_loader(scenes.test, 8, False))
    assert [len(labels) for _, labels in batches] == [8, 8, 4]


def test_more_processes_than_pictures_get_equal_shares() -> None:
    shares = [list(EpochSampler(3, True, 0, rank, 8)) for rank in range(8)]
    assert [len(share) for share in shares] == [1] * 8
    assert {share[0] for share in shares} == {0, 1, 2}


def test_what_the_loader_serves_does_not_depend_on_the_batch_size(scenes) -> None:
    def epoch(batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        loader = make_loader(scenes.train, batch_size, True, seed=4)
        loader.sampler.set_epoch(2)
        scenes.train.set_epoch(2)
        images, labels = zip(*loader, strict=True)
        assert all(x.is_contiguous(memory_format=torch.channels_last) for x in images)
        return torch.cat(images), torch.cat(labels)

    (images, labels), (again, same) = epoch(7), epoch(16)
    assert torch.equal(images, again) and torch.equal(labels, same)


def test_the_digit_is_drawn_inside_its_box() -> None:
    words = SceneWords(0, 2, range(12), words_per_scene(48))
    pool = _digit_pools()["test"]
    alpha, boxes = _digit_alpha(pool.pictures[:12], words, 48)
    for opacity, (x0, y0, x1, y1) in zip(alpha, boxes, strict=True):
        ink = opacity >= 32
        assert ink[y0:y1, x0:x1].sum() == ink.sum() > 0
        assert all(edge.any() for edge in (ink[y0], ink[y1 - 1], ink[:, x0], ink[:, x1 - 1]))


def test_a_line_through_a_corner_of_a_large_canvas_comes_back_nowhere() -> None:
    class Words:
        # Slope, steepness, a point on the line, width, presence: x + y = 0.
        values = iter((64, 0, 0, 0, 48, 1))

        def integers(self, low: int, high: int, count: int) -> np.ndarray:
            return np.full((1, count), next(self.values))

    drawn = np.argwhere(_line_alpha(Words(), 1056)[0] > 0)
    assert 0 < len(drawn) and drawn.sum(1).max() < 20


def picture(path: Path, value: int, size: tuple[int, int] = (20, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), value, dtype=np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 6), ("test", 2)):
        for value, name in enumerate(("cat", "dog")):
            for i in range(count):
                picture(tmp_path / split / name / f"{i}.png", 40 + 100 * value)
    return tmp_path


def test_train_and_test_folders(folder: Path) -> None:
    bundle = load_dataset(f"imagefolder:{folder}")
    assert (bundle.classes, bundle.image_size, bundle.skipped) == (["cat", "dog"], 20, [])
    assert (len(bundle.train), len(bundle.calibration), len(bundle.test)) == (10, 2, 4)
    assert set(bundle.test.images_uint8([0]).flatten().tolist()) == {40}
    assert load_dataset(f"imagefolder:{folder}", image_size=16).train[0][0].shape == (3, 16, 16)
    assert len(load_dataset(f"imagefolder:{folder}", train_size=3).train) == 3


def test_one_tree_is_split(folder: Path) -> None:
    bundle = load_dataset(f"imagefolder:{folder / 'train'}")
    assert len(bundle.train) + len(bundle.calibration) + len(bundle.test) == 12 and len(bundle.test) >= 1


def test_a_small_tree_keeps_every_class_for_training(tmp_path: Path) -> None:
    for name, count in (("cat", 3), ("dog", 1), ("eel", 1)):
        for i in range(count):
            picture(tmp_path / name / f"{i}.png", 9)
    bundle = load_dataset(f"imagefolder:{tmp_path}")
    assert set(bundle.train.labels.tolist()) == {0, 1, 2}
    assert len(bundle.test) == len(bundle.calibration) == 1
    (tmp_path / "cat" / "0.png").unlink()
    with pytest.raises(ValueError, match="no class has two pictures"):
        load_dataset(f"imagefolder:{tmp_path}")


def test_sizes_that_differ_and_files_that_are_no_pictures(folder: Path) -> None:
    picture(folder / "train" / "cat" / "wide.png", 40, (10, 30))
    (folder / "train" / "cat" / "._0.png").write_bytes(b"a file manager's notes")
    (folder / "train" / "notes.txt").write_text("not a class")
    bundle = load_dataset(f"imagefolder:{folder}")
    assert (bundle.image_size, bundle.skipped) == (224, [])


def test_pictures_beyond_memory_are_read_when_needed(folder: Path, monkeypatch) -> None:
    held = load_dataset(f"imagefolder:{folder}", augment=False)
    (folder / "train" / "cat" / "broken.jpg").write_bytes(b"not a picture")
    monkeypatch.setattr(folders, "MEMORY_BYTES", 0)
    bundle = load_dataset(f"imagefolder:{folder}", augment=False)
    assert [Path(p).name for p, _ in bundle.skipped] == ["broken.jpg"]
    assert torch.equal(bundle.test.__getitems__([0, 3])[0], held.test.__getitems__([0, 3])[0])
    (folder / "test" / "cat" / "0.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"0\.png became unreadable"):
        bundle.test.images_uint8([0])


def test_huge_and_sideways_pictures(folder: Path, monkeypatch) -> None:
    pixels = np.zeros((20, 20, 3), dtype=np.uint8)
    pixels[:10] = 200
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: show it a quarter turn clockwise
    Image.fromarray(pixels).save(folder / "photo.png", exif=turned)
    _, upright = load_image(folder / "photo.png", 20, (0.5,) * 3, (0.25,) * 3)
    assert upright[:, 10:].min() == 200 and upright[:, :10].max() == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(folder / "photo.png", 20, (0.5,) * 3, (0.25,) * 3)
    with pytest.raises(ValueError, match="no readable training picture is left"):
        load_dataset(f"imagefolder:{folder}")


def test_a_home_folder_is_found(folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    assert len(load_dataset(f"imagefolder:~/{folder.name}").test) == 4


def test_a_corrupt_picture_is_named_and_skipped_or_an_error(folder: Path) -> None:
    (folder / "train" / "cat" / "broken.jpg").write_bytes(b"not a picture")
    whole = (folder / "train" / "dog" / "0.png").read_bytes()
    (folder / "train" / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    bundle = load_dataset(f"imagefolder:{folder}")
    assert [Path(p).name for p, _ in bundle.skipped] == ["broken.jpg", "cut.png"]
    assert len(bundle.train) + len(bundle.calibration) == 12
    with pytest.raises(ValueError, match=r"broken\.jpg is unreadable"):
        load_dataset(f"imagefolder:{folder}", strict=True)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, "has no class folders"),
        (lambda d: (d / "only").mkdir(), "only one class"),
        (lambda d: [(d / n).mkdir() for n in "ab"], "no pictures"),
        (lambda d: picture(d / "train" / "cat" / "0.png", 1), "has train/ but no test/"),
    ],
)
def test_empty_folders(make, message: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_dataset(f"imagefolder:{tmp_path}")


def test_missing_folders_and_wrong_names(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        load_dataset(f"imagefolder:{tmp_path / 'nothing'}")
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file"):
        load_dataset(f"imagefolder:{tmp_path / 'file'}")
    with pytest.raises(FileNotFoundError, match="no CIFAR-10 in"):
        load_dataset(f"cifar10:{tmp_path}")
    with pytest.raises(ValueError, match="needs a folder: imagefolder:DIR"):
        load_dataset("imagefolder")
    with pytest.raises(ValueError, match="unknown data set 'scense'; did you mean 'scenes'"):
        load_dataset("scense")
    with pytest.raises(ValueError, match="image_size >= 24"):
        load_dataset("scenes", image_size=16)
    assert "scenes" in list_datasets()


def test_a_class_without_readable_pictures(folder: Path) -> None:
    for file in (folder / "train" / "dog").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="without a readable training picture.*dog"):
        load_dataset(f"imagefolder:{folder}")


def test_a_test_split_without_readable_pictures(folder: Path) -> None:
    for file in (folder / "test").rglob("*.png"):
        file.write_bytes(b"broken")
    with pytest.raises(ValueError, match="no readable test picture"):
        load_dataset(f"imagefolder:{folder}")


@pytest.mark.needs("torchvision")
def test_damaged_cifar10_batches(tmp_path: Path) -> None:
    (tmp_path / "cifar-10-batches-py").mkdir()
    (tmp_path / "cifar-10-batches-py" / "data_batch_1").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load_dataset(f"cifar10:{tmp_path}")


def test_cifar10_as_folders(tmp_path: Path) -> None:
    for split in ("train", "test"):
        for value, name in enumerate(("bird", "frog")):
            for i in range(4):
                picture(tmp_path / split / name / f"{i}.png", 90 * value, (32, 32))
    bundle = load_dataset(f"cifar10:{tmp_path}")
    assert (bundle.name, bundle.image_size, bundle.mean[0]) == ("cifar10", 32, 0.4914)
    assert bundle.train.augmentation.pad == 4 and bundle.train.augmentation.flip
    with pytest.raises(ValueError, match="pictures of 32 pixels"):
        load_dataset(f"cifar10:{tmp_path}", image_size=64)


@pytest.fixture
def food(tmp_path: Path) -> Path:
    """Four classes as torchvision lays them out: five pictures to train, two to test."""
    return fake_food101(tmp_path)


def test_food101_keeps_the_official_split(food: Path) -> None:
    bundle = load_dataset(f"food101:{food}", image_size=32, augment=False)
    assert bundle.classes == ["apple_pie", "bibimbap", "ceviche", "donuts"]
    sizes = [len(part) for part in (bundle.train, bundle.calibration, bundle.test)]
    assert sizes[0] + sizes[1] == 20 and sizes[2] == 8 and sizes[1] >= 1
    assert load_dataset(f"food101:{food / 'food-101'}", image_size=16).test.images.shape == (8, 3, 16, 16)
    # Blue is the same for all, red says the class.
    red = bundle.test.images_uint8(list(range(8))).float().mean((2, 3))[:, 0]
    assert torch.allclose(red, 60.0 * bundle.test.labels, atol=4)


def test_a_seeded_choice_of_classes(food: Path) -> None:
    chosen = [load_dataset(f"food101:{food}", 16, seed=seed, classes=2) for seed in (0, 0, 1, 2, 3)]
    assert chosen[0].classes == chosen[1].classes and len({tuple(c.classes) for c in chosen}) > 1
    for bundle in chosen:
        assert len(bundle.test) == 4 and set(bundle.test.labels.tolist()) == {0, 1}
        red = bundle.test.images_uint8([0, 3]).float().mean((2, 3))[:, 0] / 60
        names = ["apple_pie", "bibimbap", "ceviche", "donuts"]
        assert [names[round(float(v))] for v in red] == bundle.classes
    assert len(load_dataset(f"imagefolder:{food / 'food-101' / 'images'}", 16, classes=3).classes) == 3


def test_food101_that_is_not_there_or_damaged(food: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no Food-101 in .*images is missing.*download=True"):
        load_dataset(f"food101:{tmp_path / 'nothing'}")
    for count in (1, 5):
        with pytest.raises(ValueError, match=rf"classes must lie in 2..4 for this data set, got {count}"):
            load_dataset(f"food101:{food}", classes=count)
    with pytest.raises(ValueError, match="classes is an option of food101:DIR"):
        load_dataset("scenes", classes=3)
    (food / "food-101" / "images" / "donuts" / "5.jpg").unlink()
    assert load_dataset(f"food101:{food}", 16).skipped[0][0].endswith("donuts/5.jpg")
    (food / "food-101" / "meta" / "test.json").write_text("{")
    with pytest.raises(ValueError, match="test.json is damaged"):
        load_dataset(f"food101:{food}")


def test_a_users_own_picture(folder: Path) -> None:
    batch, pixels = load_image(folder / "test" / "dog" / "0.png", 24, (0.5,) * 3, (0.25,) * 3)
    assert batch.shape == (1, 3, 24, 24) and pixels.shape == (24, 24, 3)
    with pytest.raises(FileNotFoundError, match="there is no picture"):
        load_image(folder / "none.png", 24, (0.5,) * 3, (0.25,) * 3)
    (folder / "text.png").write_text("x")
    with pytest.raises(ValueError, match="cannot be read"):
        load_image(folder / "text.png", 24, (0.5,) * 3, (0.25,) * 3)
