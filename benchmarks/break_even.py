"""Time the row-list executor: whole networks at several densities, and single blocks to find the break-even.

    make bench                                    all of it (some minutes)
    make bench ARGS="--networks timm:resnet50"    one network
    make bench ARGS="--break-even"                only the blocks

Masks are forced (blob-like, exact density), so nothing needs training. Correctness is checked before anything is timed:
skipping must equal the masked dense computation to 1e-4. Dense and dynamic networks are prepared alike (evaluation
mode, channels-last, batch norm folded) and timed interleaved in one process. Prints markdown tables.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch

import dynaconv as dc
from dynaconv._table import format_table
from dynaconv.cost import compare_latency, machine_line
from dynaconv.measure import compare_with_dense, latency_ratios
from dynaconv.testing import force_masks

TOLERANCE = 1e-4
NETWORKS = ("resnet8_scenes", "resnet14_scenes", "timm:resnet18", "timm:resnet50", "timm:mobilenetv2_100")


def main() -> int:
    """Run what the options ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), help="names for dc.create_model")
    parser.add_argument(
        "--densities", type=float, nargs="*", default=[0.1, 0.25, 0.5], help="of the masks, 0..1"
    )
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8], help="images in a batch")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved rounds")
    parser.add_argument("--break-even", action="store_true", help="only time single blocks over densities")
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(machine_line())
    rows = _blocks(args) if args.break_even else _networks(args)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))
    return 0


def _networks(args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in args.networks:
        dense = dc.create_model(name).eval()
        dynamic = copy.deepcopy(dense)
        dc.dynamize_(dynamic)
        size = getattr(dense, "input_size", (3, 224, 224))
        for batch in args.batch:
            x = torch.randn(batch, *size)
            for density in args.densities:
                rows.append(_network(name, dense, dynamic, x, density, args.rounds))
    header = (
        "network",
        "batch",
        "density",
        "MAC ratio",
        "dense ms",
        "dynamic ms",
        "ms ratio (median)",
        "ms ratio (min)",
    )
    cells = [
        (
            r["network"],
            r["batch"],
            r["density"],
            f"{r['macs_ratio']:.3f}",
            f"{r['dense_ms']:.2f}",
            f"{r['ms']:.2f}",
            f"{r['ratio_median']:.2f}",
            f"{r['ratio_min']:.2f}",
        )
        for r in rows
    ]
    print(format_table(header, cells, "lrrrrrrr"))
    return rows


def _network(name: str, dense, dynamic, x: torch.Tensor, density: float, rounds: int) -> dict:
    with force_masks(dynamic, density, seed=1):
        worst = max(compare_with_dense(dynamic, x[:2]).values())
        if worst > TOLERANCE:
            sys.exit(
                f"{name}: skipping deviates from the masked dense computation by {worst:.1e}; nothing was timed"
            )
        ratio = dc.profile(dynamic, x[: min(4, len(x))]).macs_ratio
        times = latency_ratios(dense, {"dynamic": dynamic}, x, rounds=rounds)
    t = times["dynamic"]
    return {
        "network": name,
        "batch": len(x),
        "density": density,
        "macs_ratio": ratio,
        "deviation": worst,
        "dense_ms": times["dense"]["median_ms"],
        "ms": t["median_ms"],
        "ratio_median": t["ratio_median"],
        "ratio_min": t["ratio_min"],
    }


BLOCKS = (
    ("basic", "timm:resnet18", "layer1.0", 64, 56),
    ("basic", "timm:resnet18", "layer3.1", 256, 14),
    ("bottleneck", "timm:resnet50", "layer1.1", 256, 56),
    ("bottleneck", "timm:resnet50", "layer3.1", 1024, 14),
    ("bottleneck, groups 32", "timm:resnext50_32x4d", "layer3.1", 1024, 14),
    ("inverted residual", "timm:mobilenetv2_100", "blocks.2.1", 32, 28),
    ("inverted residual", "timm:mobilenetv2_100", "blocks.4.1", 96, 14),
)


def _blocks(args: argparse.Namespace) -> list[dict]:
    """Row lists against the dense path of the same block, over densities."""
    rows = []
    for kind, network, path, channels, side in BLOCKS:
        model = dc.create_model(network).eval().to(memory_format=torch.channels_last)
        dc.dynamize_(model, {path: dc.SpatialMasking()})
        block = model.get_submodule(path)
        for batch in args.batch:
            x = torch.randn(batch, channels, side, side).contiguous(memory_format=torch.channels_last)
            for density in (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9):
                rows.append(_block(kind, block, model, x, density, args.rounds))
    header = ("block", "channels", "size", "batch", "density", "MAC share", "row lists / dense (median)")
    cells = [
        (
            r["block"],
            r["channels"],
            r["size"],
            r["batch"],
            r["density"],
            f"{r['share']:.2f}",
            f"{r['ratio']:.2f}",
        )
        for r in rows
    ]
    print(format_table(header, cells, "lrrrrrr"))
    return rows


def _block(kind: str, block, model, x: torch.Tensor, density: float, rounds: int) -> dict:
    always, never = copy.copy(block), copy.copy(block)
    always.break_even, never.break_even = 2.0, 0.0
    with torch.inference_mode(), force_masks(model, density, seed=1):
        with dc.collect_masks(block) as masks:
            y = always(x)
        worst = float((y - never(x)).abs().max() / y.abs().max())
        if worst > TOLERANCE:
            sys.exit(f"{kind}: the two paths deviate by {worst:.1e}; nothing was timed")
        times = compare_latency({"rows": lambda: always(x), "dense": lambda: never(x)}, rounds=rounds)
    return {
        "block": kind,
        "channels": x.shape[1],
        "size": f"{x.shape[2]}x{x.shape[3]}",
        "batch": len(x),
        "density": density,
        "share": float(masks.conditional_ratio().mean()),
        "ratio": times["rows"]["median_ms"] / times["dense"]["median_ms"],
    }


if __name__ == "__main__":
    sys.exit(main())
