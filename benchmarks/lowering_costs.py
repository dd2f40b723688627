"""What masked blocks cost in ONNX Runtime, dense and sparse: the constants by which lowering="auto" chooses.

    python benchmarks/lowering_costs.py                   measure, fit, and show how well the fit foretells the choice
    python benchmarks/lowering_costs.py --write           and write src/dynaconv/export/costs.json
    python benchmarks/lowering_costs.py --folder FILES    keep the exported files there, and use those that lie there

Each network is a chain of three equal blocks with forced blob masks. Nanoseconds of the amounts that
`dynaconv.export.choose` counts, and of what gates read and routers mix, the same in both lowerings, are fitted to its
times by least squares of relative errors, none below zero.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from tables import markdown
from torch import nn

import dynaconv as dc
from dynaconv._files import atomic_write_text
from dynaconv.cost import compare_latency, machine_line
from dynaconv.export.api import _tidy
from dynaconv.export.branches import find_branches
from dynaconv.export.choose import COSTS, MARGIN, dense_amounts, nanoseconds, sparse_amounts
from dynaconv.export.runtimes import load
from dynaconv.export.trace import trace
from dynaconv.measure.race import SETTLE_SECONDS
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.testing import MaskInputs, forced

# network, block, channels, side of its map, kernels.
BLOCKS = (
    ("timm:resnet50", "layer1.1", 256, 56, None),
    ("timm:resnet50", "layer2.1", 512, 28, None),
    ("timm:resnet50", "layer3.1", 1024, 14, None),
    ("timm:resnet50", "layer4.1", 2048, 7, None),
    ("timm:resnet18", "layer1.0", 64, 56, None),
    ("timm:resnet18", "layer3.1", 256, 14, None),
    ("timm:resnet18", "layer1.0", 64, 56, "DYConv"),
    ("timm:resnet18", "layer3.1", 256, 14, "DYConv"),
    ("timm:mobilenetv2_100", "blocks.1.1", 24, 56, None),
    ("timm:mobilenetv2_100", "blocks.4.1", 96, 14, None),
    ("timm:mobilenetv2_100", "blocks.5.1", 160, 7, None),
)
# Amounts that cost the same in both lowerings.
SAME = ("gate", "mixed")
COUNT, DENSITIES = 3, (0.1, 0.25, 0.5, 0.75)


def main() -> int:
    """Export, time, fit, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="images in a batch")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--folder", type=Path, help="keep the exported files there")
    parser.add_argument("--write", action="store_true", help='make the table that lowering="auto" reads')
    args = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    with tempfile.TemporaryDirectory() as folder:
        rows = [row for case in BLOCKS for row in measure(case, args, args.folder or Path(folder))]
    constants = fit(rows)
    print({name: float(f"{value:.3g}") for name, value in constants.items()})
    print(table(rows, constants))
    if args.write:
        kept = {name: float(f"{value:.4g}") for name, value in constants.items() if name not in SAME}
        atomic_write_text(COSTS, json.dumps({"machine": machine_line(), "ns": kept}, indent=1) + "\n")
        print(f"wrote {COSTS.name}")
    return 0


def chain(network: str, path: str, channels: int, side: int, kernels: str | None) -> nn.Module:
    """Equal masked blocks, one behind the other, with kernels for each image where a method is named."""
    block = dc.create_model(network).get_submodule(path)
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(COUNT)))
    rules = {} if kernels is None else {r"re:.*conv\d": getattr(dc, kernels)()}
    dc.dynamize_(model, {"": dc.SpatialMasking(), **rules}, input_size=(channels, side, side))
    return model.eval()


def measure(case: tuple, args: argparse.Namespace, folder: Path) -> list[dict]:
    """One row for each batch, lowering and density: amounts of one network, and its milliseconds."""
    network, path, channels, side, kernels = case
    name = f"{network} {path}" + (f" {kernels}" if kernels else "")
    model = chain(*case)
    given = MaskInputs(copy.deepcopy(model)).eval()
    x = torch.randn(1, channels, side, side)
    example = (x, *forced(model, x, 0.5))
    traced = trace(given, example, dynamic_batch=True, dynamic_size=False)
    _tidy(traced)
    branches = find_branches(traced.graph, traced.masks)
    files = {
        kind: folder / f"{name.split(':')[1].replace(' ', '-')}-{kind}.onnx" for kind in ("dense", "sparse")
    }
    for kind, file in files.items():
        if not file.exists():
            dc.export.onnx(given, example, file, lowering=kind, dial=None, report=(), check=False)
    mixed = float(sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, DynamicConv)))
    rows = []
    for batch in args.batch:
        runs, x = {}, torch.randn(batch, channels, side, side)
        for kind, file in files.items():
            run = load("ort", file, torch.get_num_threads(), batch)
            for density in DENSITIES if kind == "sparse" else (0.5,):
                inputs = (x, *forced(model, x, density))
                feed = {f"input_{i}" if i else "images": t.numpy() for i, t in enumerate(inputs)}
                runs[kind, density] = lambda run=run, feed=feed: run(feed)
        names = {f"{kind} {density}": call for (kind, density), call in runs.items()}
        times = compare_latency(names, rounds=args.rounds, settle_seconds=SETTLE_SECONDS, min_round_ms=5)
        for kind, density in runs:
            amounts = {"gate": float(COUNT * channels * side * side), "mixed": mixed}
            for branch in branches:
                one = dense_amounts(branch) if kind == "dense" else sparse_amounts(branch, density, 1)
                amounts = {name: amounts.get(name, 0.0) + one.get(name, 0.0) for name in {**amounts, **one}}
            scaled = {name: value * (1 if name == "block" else batch) for name, value in amounts.items()}
            ms = times[f"{kind} {density}"]["min_ms"]
            rows.append({"case": name, "batch": batch, "kind": kind, "density": density,
                         "amounts": scaled, "ms": ms})  # fmt: skip
    return rows


def fit(rows: list[dict]) -> dict[str, float]:
    """Nanoseconds for each amount; those that come out below zero are left out, one after the other."""
    names = sorted({name for row in rows for name in row["amounts"]})
    while True:
        matrix = np.array([[row["amounts"].get(n, 0.0) / (row["ms"] * 1e6) for n in names] for row in rows])
        found = np.linalg.lstsq(matrix, np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            return dict(zip(names, found.tolist(), strict=True))
        names.pop(int(found.argmin()))


def table(rows: list[dict], constants: dict[str, float]) -> str:
    """Measured and foretold speed-up of the sparse lowering."""
    dense = {(row["case"], row["batch"]): row for row in rows if row["kind"] == "dense"}
    cells = []
    for row in rows:
        if row["kind"] == "sparse":
            base = dense[row["case"], row["batch"]]
            parts = [nanoseconds(r["amounts"], constants) for r in (base, row)]
            cells.append((
                row["case"], row["batch"], f"{row['density']:g}", f"{base['ms']:.3g}", f"{row['ms']:.3g}",
                f"{base['ms'] / row['ms']:.2f}", f"{parts[0] / parts[1]:.2f}",
                "sparse" if parts[1] < MARGIN * parts[0] else "dense",
            ))  # fmt: skip
    header = (
        "block, three times",
        "batch",
        "density",
        "dense, ms",
        "sparse, ms",
        "speed-up",
        "foretold",
        "choice",
    )
    return markdown(header, cells)


if __name__ == "__main__":
    sys.exit(main())
