"""Single masked blocks in eager PyTorch: row lists against the dense path, over densities, to find the break-even.

    make bench ARGS="--break-even"

Masks are forced (blob-like, exact density), so nothing needs training; the two paths are
compared before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import sys

import torch
from tables import markdown

import dynaconv as dc
from dynaconv.cost import compare_latency
from dynaconv.testing import force_masks

TOLERANCE = 1e-4
BLOCKS = (
    ("basic", "timm:resnet18", "layer1.0", 64, 56),
    ("basic", "timm:resnet18", "layer3.1", 256, 14),
    ("bottleneck", "timm:resnet50", "layer1.1", 256, 56),
    ("bottleneck", "timm:resnet50", "layer3.1", 1024, 14),
    ("bottleneck, groups 32", "timm:resnext50_32x4d", "layer3.1", 1024, 14),
    ("inverted residual", "timm:mobilenetv2_100", "blocks.2.1", 32, 28),
    ("inverted residual", "timm:mobilenetv2_100", "blocks.4.1", 96, 14),
)


def break_even(args: argparse.Namespace) -> list[dict]:
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
    print(markdown(header, cells))
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
