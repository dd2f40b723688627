"""`dynaconv explain`: where a network computed on a user's own pictures."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import Opened, choose_targets, open_network
from dynaconv.cli.outcome import Outcome, number, say, share

HELP = "where did it compute on my own pictures?"
DESCRIPTION = """
Runs a trained dynamic network on your own pictures (files, or folders of them) at each of its budgets, and
writes a page with every block's mask and the computation map, and one overlay PNG a picture. Prints the
prediction, its confidence and the share of the conditional multiply-adds that was executed for each
picture. Networks for keypoints show the points that they found, and with test:N where these really are."""
EXAMPLES = """\
dynaconv explain runs/demo photo.jpg
dynaconv explain runs/demo pictures/ --target 0.3 --out explained
dynaconv explain runs/demo a.png b.png --json
dynaconv explain runs/keypoints test:8"""


def add_arguments(parser: Any) -> None:
    """The run, the pictures, the budgets, the output."""
    parser.add_argument("run", help="run folder with a dynamic network")
    parser.add_argument(
        "images",
        nargs="+",
        help="image files, or folders of them; test:N are the first N pictures of the run's test split",
    )
    parser.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=None,
        help="budgets, shares of the conditional MACs; left out, all",
    )
    parser.add_argument("--out", type=str, default=None, help="folder for the page; left out, RUN/explain")
    parser.add_argument(
        "--strict", action="store_true", help="stop at an unreadable picture instead of skipping it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Any) -> Outcome:
    """Load, run, draw, tell.

    Raises:
        ValueError: a static network, no readable picture; FileNotFoundError: no such run or picture.
    """
    import dynaconv as dc

    opened = open_network(args.run)
    if opened.folder is None:
        raise _checks.cli_needs_run(args.run, "explain")
    task = _task(opened)
    if not dc.gates(opened.model):
        raise _checks.cli_nothing_to_explain(opened.name)
    targets = choose_targets(opened.model, args.target)
    out = output_folder(args.out or opened.folder / "explain")
    asked = re.fullmatch(r"test:(\d+)", args.images[0])
    if asked is None or Path(args.images[0]).exists():
        names, normalised, raw, skipped = load_pictures(find_pictures(args.images), opened, args.strict)
        truth = None
    else:
        if len(args.images) > 1:
            raise _checks.cli_explain_mixed(args.images[0])
        names, normalised, raw, truth = _test_pictures(opened, int(asked.group(1)))
        skipped = []
    gallery = _gallery(opened, targets, names, normalised, raw, task, truth)
    page = _write(gallery, out, opened, skipped)
    classes = opened.metadata.get("classes") or []
    rows = (_rows if task is None else partial(_point_rows, task=task))(gallery, names, targets, classes)
    data = {"run": opened.folder, "page": page, "pictures": rows, "skipped": skipped}
    return Outcome((_text if task is None else _points_text)(rows, page), data)


def _task(opened: Opened) -> Any:
    """How the network's keypoints are judged; None for classes."""
    from dynaconv.data import Keypoints

    metric = opened.metadata.get("metric", "accuracy")
    if metric == "accuracy":
        return None
    named = re.fullmatch(r"PCK(\w*)@([0-9.]+)", metric)
    if named is None:
        raise _checks.cli_no_classes(opened.name, metric)
    return Keypoints(alpha=float(named.group(2)), length=named.group(1))


def _test_pictures(opened: Opened, count: int) -> tuple[list[str], Any, Any, Any]:
    """The first pictures of the run's own test split, and what they show."""
    from dynaconv.cli.datasets import run_dataset

    _checks.cli_at_least("test:N", count, 1)
    test = run_dataset(opened).test
    indices = list(range(min(count, len(test))))
    images, truth = test.__getitems__(indices)
    raw = test.images_uint8(indices).permute(0, 2, 3, 1).contiguous().numpy()
    return [f"test {i}" for i in indices], images, raw, truth


def find_pictures(paths: Sequence[str]) -> list[Path]:
    """Files as they were named, and the image files of folders, in order.

    Raises:
        FileNotFoundError: a path that does not exist; ValueError: folders without image files.
    """
    from dynaconv.data.image_files import EXTENSIONS

    found: list[Path] = []
    for name in paths:
        path = Path(name)
        if not path.exists():
            raise _checks.cli_no_picture_file(path)
        inside = (
            sorted(p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS) if path.is_dir() else [path]
        )
        found.extend(inside)
    if not found:
        raise _checks.cli_no_pictures(paths)
    return found


def load_pictures(
    files: Sequence[Path], opened: Opened, strict: bool
) -> tuple[list[str], Any, Any, list[dict]]:
    """Names, pictures [K, 3, H, W] as the network wants them, uint8 [K, H, W, 3] for drawing, and what was skipped."""
    import numpy as np
    import torch

    from dynaconv.data import load_image

    preparation = _preparation(opened)
    names, pictures, raw, skipped = [], [], [], []
    for file in files:
        try:
            normalised, pixels = load_image(file, **preparation)
        except (ValueError, OSError) as error:
            if strict:
                raise
            say(f"skipped {file}: {error}")
            skipped.append({"file": str(file), "reason": str(error)})
            continue
        names.append(file.name)
        pictures.append(normalised)
        raw.append(pixels)
    if not names:
        raise _checks.cli_no_pictures(files)
    return names, torch.cat(pictures), np.stack(raw), skipped


def _preparation(opened: Opened) -> dict[str, Any]:
    """How the network's pictures were made ready: side in pixels, mean and standard deviation a channel."""
    if not opened.metadata.get("mean") or not opened.metadata.get("std"):
        raise _checks.cli_no_normalisation(opened.name)
    return {
        "image_size": opened.input_size[1],
        "mean": opened.metadata["mean"],
        "std": opened.metadata["std"],
    }


def _gallery(
    opened: Opened,
    targets: list[float | None],
    names: list[str],
    pictures: Any,
    raw: Any,
    task: Any,
    truth: Any,
) -> dict[str, Any]:
    import numpy as np

    from dynaconv.measure import gallery_of_images

    if task is None:
        known = {} if truth is None else {"labels": truth.tolist()}
    else:
        known = {"task": task, "truth": truth}
    gallery = gallery_of_images(opened.model, pictures, raw, targets, names=names, **known)
    if task is None:
        gallery["classes"] = np.asarray([str(c) for c in opened.metadata.get("classes") or []])
    return gallery


def _write(gallery: dict[str, Any], out: Path, opened: Opened, skipped: list[dict]) -> Path:
    import numpy as np

    from dynaconv import gates
    from dynaconv._files import atomic_path
    from dynaconv.report import write_explanation

    gallery, notes = _drawable(gallery)
    if any(gate.scope == "channels" for gate in gates(opened.model).values()):
        notes += [
            "Gates over channels are drawn as stripes, a group of channels each; dark ones were not computed."
        ]
    notes += [f"Skipped {entry['file']}: {entry['reason']}" for entry in skipped]
    with atomic_path(out / "gallery.npz") as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, **gallery)
    title = f"Where {opened.name} computed"
    if "points" in gallery:
        rings = "; rings: where they are" if "truth" in gallery else ""
        notes.insert(
            0,
            f"Crosses: where the network found keypoints{rings}. Percentages: the heat-maps' mean height.",
        )
    return write_explanation(out / "gallery.npz", out / "explain.html", title=title, notes=notes)


def _drawable(gallery: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A page needs a number for each budget; without calibration that is the share that was executed."""
    import numpy as np

    if not np.isnan(gallery["targets"]).any():
        return gallery, []
    note = "The network is not calibrated; the budget shown is the share of the conditional MACs that was executed."
    return {**gallery, "targets": np.asarray([round(float(gallery["ratio_0"].mean()), 3)])}, [note]


def _rows(
    gallery: dict[str, Any], names: list[str], targets: list[float | None], classes: list[str]
) -> list[dict]:
    rows = []
    for k, name in enumerate(names):
        for t, target in enumerate(targets):
            predicted = int(gallery["predictions"][t, k])
            rows.append(
                {
                    "file": name,
                    "target": target,
                    "prediction": classes[predicted] if predicted < len(classes) else f"class {predicted}",
                    "confidence": float(gallery["confidence"][t, k]),
                    "conditional_ratio": float(gallery[f"ratio_{t}"][k]),
                }
            )
    return rows


def _point_rows(
    gallery: dict[str, Any], names: list[str], targets: list[float | None], classes: list[str], task: Any
) -> list[dict]:
    import numpy as np

    rows = []
    for k, name in enumerate(names):
        for t, target in enumerate(targets):
            found = gallery["points"][t, k]
            row = {
                "file": name,
                "target": target,
                "points": [
                    {"name": classes[i] if i < len(classes) else f"point {i}", "x": float(x), "y": float(y)}
                    for i, (x, y) in enumerate(found)
                ],
                "confidence": float(gallery["confidence"][t, k]),
                "conditional_ratio": float(gallery[f"ratio_{t}"][k]),
            }
            if "truth" in gallery:
                truth = gallery["truth"][k]
                known = truth[:, 2] > 0
                apart = np.linalg.norm(found - truth[:, :2], axis=1)
                row["known"] = int(known.sum())
                row["right"] = int((known & (apart <= task.alpha * truth[:, 3])).sum())
            rows.append(row)
    return rows


def _points_text(rows: list[dict], page: Path) -> str:
    cells = [
        (
            r["file"],
            "as trained" if r["target"] is None else f"{r['target']:g}",
            f"{r['right']} of {r['known']}" if "right" in r else "-",
            share(r["confidence"]),
            number(r["conditional_ratio"]),
        )
        for r in rows
    ]
    header = ("picture", "budget", "right keypoints", "mean height", "conditional MACs")
    return f"{format_table(header, cells, 'llrrr')}\n{page}"


def _text(rows: list[dict], page: Path) -> str:
    cells = [
        (
            r["file"],
            "as trained" if r["target"] is None else f"{r['target']:g}",
            r["prediction"],
            share(r["confidence"]),
            number(r["conditional_ratio"]),
        )
        for r in rows
    ]
    table = format_table(
        ("picture", "budget", "prediction", "confidence", "conditional MACs"), cells, "lllrr"
    )
    return f"{table}\n{page}"
