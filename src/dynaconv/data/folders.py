"""`imagefolder:DIR`: pictures in a folder for each class."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dynaconv import _checks
from dynaconv.data.augment import Augmentation
from dynaconv.data.bundle import DataBundle, subset_indices
from dynaconv.data.dataset import FileImages, ImageSet, MemoryImages, Triple
from dynaconv.data.image_files import EXTENSIONS, decode, picture_size
from dynaconv.data.progress import track

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MEMORY_BYTES = 1_500_000_000
LARGEST_NATIVE = 128
TEST_NAMES = ("test", "val", "valid", "validation")
_log = logging.getLogger("dynaconv")


@dataclass
class Files:
    """Pictures with the numbers of their classes."""

    paths: list[Path]
    labels: list[int]

    def take(self, indices: Sequence[int]) -> Files:
        """Some of them."""
        return Files([self.paths[i] for i in indices], [self.labels[i] for i in indices])


def load_folder(
    folder: str | Path,
    image_size: int | None = None,
    train_size: int | None = None,
    seed: int = 0,
    strict: bool = False,
    augment: bool = True,
    *,
    name: str | None = None,
    mean: Triple = MEAN,
    std: Triple = STD,
    classes: int | None = None,
) -> DataBundle:
    """DIR/train/CLASS/* with DIR/test/CLASS/* (or val/), or DIR/CLASS/*, of which a tenth per class becomes the test.

    A tenth of the training pictures, at most 2,000, is held out as the calibration split.

    Args:
        image_size: pictures are resized (shorter side) and cropped to this; None keeps a common native size up to 128,
            otherwise 224.
        strict: an unreadable picture is an error; otherwise it is named and skipped.
        classes: a seeded choice of so many classes; None takes all.
    Raises:
        FileNotFoundError: no such folder. ValueError: no classes, no pictures, unreadable pictures with strict.
    """
    root = Path(folder)
    classes, train, test = some_classes(*_find(root), wanted=classes, seed=seed)
    options = {"name": name or f"imagefolder:{root}", "mean": mean, "std": std}
    return bundle_of_files(
        root, classes, train, test, image_size, train_size, seed, strict, augment, **options
    )


def bundle_of_files(
    root: Path,
    classes: list[str],
    train: Files,
    test: Files,
    image_size: int | None,
    train_size: int | None,
    seed: int,
    strict: bool,
    augment: bool,
    *,
    name: str,
    mean: Triple = MEAN,
    std: Triple = STD,
) -> DataBundle:
    """Pictures that are listed already; the arguments are those of `load_folder`.

    Raises:
        ValueError: as `load_folder`.
    """
    size = image_size or _native_size(train.paths)
    in_memory = (len(train.paths) + len(test.paths)) * size * size * 3 <= MEMORY_BYTES
    open_all = _in_memory if in_memory else _on_disk
    skipped: list[tuple[str, str]] = []
    (train, of_train), (test, of_test) = (
        _usable(f, open_all(f, size), strict, skipped, root) for f in (train, test)
    )
    if skipped:
        _log.warning("%d unreadable pictures skipped in %s, such as %s", len(skipped), root, skipped[0][0])
    _refuse_empty(root, classes, train, test)
    held_out = _tenth_of_each_class(train.labels, seed, most=2000)
    rest = sorted(set(range(len(train.paths))) - set(held_out))
    chosen = [rest[i] for i in subset_indices(len(rest), train_size, seed).tolist()]

    def split(files: Files, pixels: Tensor | None, indices: Sequence[int]) -> ImageSet:
        part = files.take(indices)
        labels = torch.tensor(part.labels, dtype=torch.int64)
        if pixels is None:
            return FileImages(part.paths, labels, mean, std, image_size=size)
        return MemoryImages(pixels[list(indices)], labels, mean, std)

    parts = {
        "train": split(train, of_train, chosen),
        "calibration": split(train, of_train, held_out),
        "test": split(test, of_test, range(len(test.paths))),
    }
    if augment:
        parts["train"].augmentation = Augmentation(max(1, size // 8), flip=True, seed=seed)
    return DataBundle(name, classes, size, mean, std, **parts, skipped=skipped)


def some_classes(
    names: list[str], train: Files, test: Files, *, wanted: int | None, seed: int
) -> tuple[list[str], Files, Files]:
    """A seeded choice of classes, numbered anew in their order, and their pictures.

    Raises:
        ValueError: fewer than two classes, or more than there are.
    """
    if wanted is None:
        return names, train, test
    if not 2 <= wanted <= len(names):
        raise _checks.data_class_count(wanted, len(names))
    chosen = sorted(
        torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))[:wanted].tolist()
    )
    number = {label: i for i, label in enumerate(chosen)}

    def of(part: Files) -> Files:
        kept = part.take([i for i, label in enumerate(part.labels) if label in number])
        return Files(kept.paths, [number[label] for label in kept.labels])

    return [names[label] for label in chosen], of(train), of(test)


def _find(root: Path) -> tuple[list[str], Files, Files]:
    if not root.exists():
        raise FileNotFoundError(
            f"there is no folder {root}; imagefolder expects DIR/train/CLASS/*.jpg or DIR/CLASS/*.jpg"
        )
    if not root.is_dir():
        raise ValueError(f"{root} is a file; imagefolder expects a folder with a sub-folder for each class")
    try:
        test_root = next((root / n for n in TEST_NAMES if (root / n).is_dir()), None)
        if (root / "train").is_dir() and test_root is not None:
            classes = _classes(root / "train")
            others = _classes(test_root)
            if unknown := sorted(set(others) - set(classes)):
                raise ValueError(
                    f"{test_root} has classes that {root / 'train'} lacks: {', '.join(unknown[:5])}"
                )
            return classes, _list(root / "train", classes), _list(test_root, classes)
        _refuse_train_without_test(root)
        classes = _classes(root)
        files = _list(root, classes)
    except PermissionError as error:
        raise ValueError(f"{error.filename} cannot be read: permission denied") from None
    # The same test pictures whatever the seed, so that runs compare.
    tested = _tenth_of_each_class(files.labels, seed=0)
    rest = sorted(set(range(len(files.paths))) - set(tested))
    return classes, files.take(rest), files.take(tested)


def _refuse_train_without_test(root: Path) -> None:
    folders = [p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if folders == ["train"]:
        raise ValueError(
            f"{root} has train/ but no test/; add {root / 'test'}, or name {root / 'train'} to have it split"
        )


def _classes(folder: Path) -> list[str]:
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise ValueError(f"{folder} has no class folders; expected {folder}/CLASS/*.jpg")
    if len(names) == 1:
        raise ValueError(f"{folder} has only one class ({names[0]}); a classifier needs at least two")
    return names


def _list(folder: Path, classes: list[str]) -> Files:
    files = Files([], [])
    for label, name in enumerate(classes):
        if not (folder / name).is_dir():
            continue
        found = sorted(
            p
            for p in (folder / name).rglob("*")
            if p.suffix.lower() in EXTENSIONS and not p.name.startswith(".") and p.is_file()
        )
        files.paths += found
        files.labels += [label] * len(found)
    if not files.paths:
        raise ValueError(f"{folder} has class folders but no pictures ({', '.join(EXTENSIONS[:4])}, ...)")
    return files


def _native_size(paths: list[Path]) -> int:
    """The pictures' own size if a sample of them agrees on a small square, else 224."""
    sizes = set()
    for path in paths[:: max(1, len(paths) // 50)][:50]:
        try:
            sizes.add(picture_size(path))
        except OSError:
            continue
    size = next(iter(sizes)) if len(sizes) == 1 else (0, 1)
    return size[0] if size[0] == size[1] and size[0] <= LARGEST_NATIVE else 224


def _usable(
    files: Files,
    opened: tuple[Tensor | None, dict[int, str]],
    strict: bool,
    skipped: list[tuple[str, str]],
    root: Path,
) -> tuple[Files, Tensor | None]:
    """The readable pictures; the others are recorded in `skipped`, or an error with strict."""
    pixels, faults = opened
    for i, reason in faults.items():
        if strict:
            raise ValueError(
                f"{files.paths[i]} is unreadable: {reason}; remove it, or run without strict to skip it"
            )
        skipped.append((str(files.paths[i].relative_to(root)), reason))
    if not faults:
        return files, pixels
    kept = [i for i in range(len(files.paths)) if i not in faults]
    return files.take(kept), None if pixels is None else pixels[kept]


class _Sized:
    """An iterator with a length, for progress bars."""

    def __init__(self, items: Iterable[object], count: int) -> None:
        self.items, self.count = items, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[object]:
        return iter(self.items)


def _refuse_empty(root: Path, classes: list[str], train: Files, test: Files) -> None:
    if not train.paths or not test.paths:
        part = "test" if train.paths else "training"
        raise ValueError(f"no readable {part} picture is left in {root}")
    if missing := [name for i, name in enumerate(classes) if i not in set(train.labels)]:
        raise ValueError(f"classes without a readable training picture in {root}: {', '.join(missing[:5])}")


def _tenth_of_each_class(labels: list[int], seed: int, most: int | None = None) -> list[int]:
    """Indices of a seeded tenth of every class, about `most` in all; at least one picture, and never a class's last.

    Raises:
        ValueError: no class has two pictures, so none can be held out.
    """
    generator = torch.Generator().manual_seed(seed)
    share = 0.1 if most is None else min(0.1, most / len(labels))
    chosen: list[int] = []
    table = np.asarray(labels)
    for label in range(int(table.max()) + 1):
        rows = np.flatnonzero(table == label)
        count = min(round(len(rows) * share), len(rows) - 1)
        chosen += rows[torch.randperm(len(rows), generator=generator)[:count].numpy()].tolist()
    if not chosen:
        spare = np.flatnonzero(np.bincount(table)[table] > 1)
        if not len(spare):
            raise ValueError("no class has two pictures, so none can be held out; add more pictures")
        chosen = [int(spare[int(torch.randint(len(spare), (1,), generator=generator))])]
    return sorted(chosen)


def _in_memory(files: Files, size: int) -> tuple[Tensor, dict[int, str]]:
    """All pictures decoded, uint8 [N, 3, size, size], and the faults of those that could not be."""
    images = torch.zeros(len(files.paths), 3, size, size, dtype=torch.uint8)
    faults: dict[int, str] = {}

    def read(item: tuple[int, Path]) -> None:
        i, path = item
        try:
            images[i] = torch.from_numpy(decode(path, size)).permute(2, 0, 1)
        except OSError as error:
            faults[i] = str(error)

    _for_all(read, files, "reading pictures")
    return images, dict(sorted(faults.items()))


def _on_disk(files: Files, size: int) -> tuple[None, dict[int, str]]:
    """Too many pictures for memory: only their headers are checked now."""
    faults: dict[int, str] = {}

    def check(item: tuple[int, Path]) -> None:
        try:
            picture_size(item[1])
        except OSError as error:
            faults[item[0]] = str(error)

    _for_all(check, files, "checking pictures")
    return None, dict(sorted(faults.items()))


def _for_all(work: Callable[[tuple[int, Path]], None], files: Files, what: str) -> None:
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(work, enumerate(files.paths))
        for _ in track(_Sized(results, len(files.paths)), what, len(files.paths) > 2000):
            pass


def folder_from_spec(spec: str) -> str:
    """DIR of "imagefolder:DIR", with ~ resolved: shells leave it alone after a colon.

    Raises:
        ValueError: DIR is missing.
    """
    kind, _, folder = spec.partition(":")
    if not folder:
        raise ValueError(f"{kind} needs a folder: {kind}:DIR, such as {kind}:./pictures")
    return str(Path(folder).expanduser())
