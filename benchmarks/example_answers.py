"""Compare the example programs, in an environment without torch, with eager PyTorch on test pictures.

    .venv/bin/python benchmarks/example_answers.py runs/demo
    .venv/bin/python benchmarks/example_answers.py runs/demo --target 0.5 --count 200 --node FOLDER

Makes a fresh virtual environment with onnxruntime, numpy and Pillow alone, exports the run, writes test pictures as
PNG, and lets examples/classify.py name their classes. --node: a folder where `npm install onnxruntime-node pngjs` was
run; then examples/classify.mjs answers, too.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dynaconv as dc
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.networks import open_network, set_target

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def main() -> int:
    """Export, answer, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", help="a finished run, e.g. of `dynaconv demo`")
    parser.add_argument("--target", type=float, help="calibrated budget; the middle one if left out")
    parser.add_argument("--count", type=int, default=200, help="test pictures")
    parser.add_argument("--lowering", default="sparse", choices=("sparse", "dense", "auto"))
    parser.add_argument("--node", type=Path, help="folder with node_modules")
    args = parser.parse_args()
    opened = open_network(args.run)
    targets = dc.budget.calibration.calibrated_targets(opened.model)
    target = args.target or sorted(targets)[len(targets) // 2]
    set_target(opened.model, target)
    bundle = run_dataset(opened)
    x, labels = bundle.test.__getitems__(list(range(args.count)))
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (bundle.mean, bundle.std))
    pixels = ((x * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    with torch.no_grad():
        # What was written to the files, so that both see the same pictures.
        expected = [
            opened.model((pixels[i : i + 1].float() / 255 - mean) / std).argmax(1) for i in range(args.count)
        ]
    expected = torch.cat(expected).numpy()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        model = place / "model.onnx"
        facts = {key: opened.metadata[key] for key in ("classes", "mean", "std", "image_size")}
        done = dc.export.onnx(opened.model, (x[:2],), model, lowering=args.lowering, metadata=facts)
        pictures = []
        for i, picture in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
            pictures.append(str(place / f"{i}.png"))
            Image.fromarray(picture).save(pictures[-1])
        print(f"{args.run}, target {target:g}, {args.count} test pictures, {set(done.blocks.values())}")
        print(f"eager PyTorch: accuracy {np.mean(expected == np.asarray(labels)):.4f}")
        words = [str(model), *pictures, "--budget", f"{target:g}"]
        same = [
            report(
                "Python without torch",
                [str(python_without_torch(place)), str(EXAMPLES / "classify.py"), *words],
                facts,
                expected,
            )
        ]
        if args.node:
            shutil.copy(EXAMPLES / "classify.mjs", args.node / "classify.mjs")
            same.append(report("Node", ["node", str(args.node / "classify.mjs"), *words], facts, expected))
    return int(not all(same))


def python_without_torch(place: Path) -> Path:
    """The interpreter of a fresh environment that has what the example imports and nothing else."""
    venv.create(place / "venv", with_pip=True)
    python = place / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "onnxruntime", "numpy", "pillow"], check=True)
    for name in ("torch", "dynaconv"):
        found = subprocess.run([python, "-c", f"import {name}"], capture_output=True, check=False)
        if found.returncode == 0:
            sys.exit(f"the fresh environment has {name}")
    return python


def report(title: str, command: list[str], facts: dict, expected: np.ndarray) -> bool:
    """Run a program over all pictures and say whether it answers as eager PyTorch does."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{title}: {done.stderr}")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    named = np.array([facts["classes"].index(answer["class"]) for answer in answers])
    density, same = np.mean([answer["density"] for answer in answers]), int((named == expected).sum())
    print(f"{title}: {same} of {len(expected)} answers as eager PyTorch, mean density {density:.3f}")
    return same == len(expected)


if __name__ == "__main__":
    sys.exit(main())
