"""Whole networks, every engine: ours and the fastest dense ones there are, interleaved in one process.

    make bench                                                  ResNet-50 and MobileNetV2 (some minutes)
    make bench ARGS="--networks other dynamic --check"          all the others; exit code 1 where one misses its limit
    make bench ARGS="--networks dynamic --precision float32 --engines eager"
                                                                dynamic kernels against our own engine without them
    make bench ARGS="--linear --networks timm:resnet50"         time against executed MACs, densities 0.1 to 1
    make bench ARGS="--roofline --networks timm:resnet50"       each layer against this machine's peaks
    make bench ARGS="--break-even"                              single blocks in eager PyTorch

Weights are random (batch norms settled, so that every branch computes something), pictures are noise, masks are
forced: blob-like, exact density, in every block. Our engine is compared with eager PyTorch first; while it is wrong,
no number is printed. The tables are markdown; a cell with two numbers is minimum / median, ratios likewise.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path

import torch
from break_even import break_even
from limits import limit
from linear import linear
from roofline import roofline
from tables import digits, markdown, ms

import dynaconv as dc
from dynaconv.cost import machine_line
from dynaconv.measure.memory import peak_memory
from dynaconv.measure.race import OURS, TITLES, EnginesDisagree, Race, Runner, race
from dynaconv.measure.rivals import RIVALS
from dynaconv.measure.untrained import settle_norms_

GROUPS = {
    "main": ["timm:resnet50", "timm:mobilenetv2_100"],
    "other": [
        "timm:resnet18", "timm:resnet34", "timm:resnet101", "timm:resnext50_32x4d", "timm:regnety_008",
        "timm:mobilenetv3_large_100", "timm:efficientnet_b0", "timm:convnext_tiny",
    ],
    "dynamic": [
        "dyconv4_resnet18", "dcd_mobilenetv2_100", "condconv8_mobilenetv2_100", "odconv4_resnet18",
        "dynet_mobilenetv2_100", "weightnet_shufflenetv2_100",
    ],
}  # fmt: skip


def main() -> int:
    """Run what the options ask for."""
    args = parse()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(machine_line())
    names = [n for name in args.networks for n in GROUPS.get(name, [name])]
    try:
        if args.break_even:
            rows = break_even(args)
        elif args.linear:
            rows = [linear(n, *networks(n, args.input_size), b, args) for n in names for b in args.batch]
        elif args.roofline:
            rows = [roofline(n, *networks(n, args.input_size), b, args) for n in names for b in args.batch]
        else:
            rows = whole_networks(names, args)
    except EnginesDisagree as error:
        sys.exit(str(error))
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1) + "\n")
    return check(rows) if args.check else 0


def check(rows: list[dict]) -> int:
    """0 where every promise that can be checked is kept; 1 where one is broken, or none could be checked."""
    promised = [row for row in rows if row.get("limit")]
    missed = [row for row in promised if row["ratio_min"] > row["limit"]]
    if not promised:
        print("\nno promise could be checked: they are against ONNX Runtime and OpenVINO", file=sys.stderr)
    for row in missed:
        what = f"{row['network']}, batch {row['batch']}, {row['precision']}, {row['masks']}"
        print(f"\nmissed: {what}: {row['ratio_min']:.3f}, promised {row['limit']:.3f}")
    return 0 if promised and not missed else 1


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", default=["main"], help=f"names for dc.create_model, or {', '.join(GROUPS)}")
    add("--densities", type=float, nargs="+", default=[1.0, 0.5, 0.25], help="of the masks, 0..1")
    add("--batch", type=int, nargs="+", default=[1, 8], help="images in a batch")
    add("--precision", nargs="+", choices=tuple(OURS), default=list(OURS), help="that our engine computes in")
    add("--engines", nargs="+", choices=tuple(RIVALS), default=list(RIVALS), help="dense rivals")
    add("--rounds", type=int, default=15, help="interleaved rounds")
    add("--seconds", type=float, help="begin no further round after so long")
    add("--threads", type=int, help="of every engine; default torch's own number")
    add("--input-size", type=int, nargs=3, default=[3, 224, 224], metavar=("C", "H", "W"))
    add("--memory", action="store_true", help="also the peak memory of each engine, each in its own process")
    add("--linear", action="store_true", help="fit time to executed MACs instead")
    add("--roofline", action="store_true", help="each layer against the processor's peaks instead")
    add("--break-even", action="store_true", help="single blocks in eager PyTorch instead")
    add("--check", action="store_true", help="exit code 1 where a ratio misses its limit")
    add("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def networks(name: str, size: list[int]) -> tuple[torch.nn.Module, torch.nn.Module | None]:
    """A static network, and the same with masks or with dynamic kernels; None where it cannot be converted."""
    settle = torch.randn(4, *size)
    model = dc.create_model(name)
    if dc.dynamic_layers(model):
        dense = copy.deepcopy(model)
        dc.revert_(dense)
        return settle_norms_(dense, settle), settle_norms_(model, settle)
    dynamic = copy.deepcopy(settle_norms_(model, settle))
    try:
        dc.dynamize_(dynamic)
    except ValueError as error:
        print(f"{name} stays static: {error}")
        dynamic = None
    return model, dynamic


def whole_networks(names: list[str], args: argparse.Namespace) -> list[dict]:
    """Two tables for each network: the dense engines, and ours against the fastest of them."""
    rows = []
    for name in names:
        dense, dynamic = networks(name, args.input_size)
        for batch in args.batch:
            x = torch.randn(batch, *args.input_size)
            result = race(
                dense, runners(dynamic, args.densities), x, rivals=args.engines, precisions=args.precision,
                rounds=args.rounds, seconds=args.seconds, progress=lambda line: print(line, file=sys.stderr),
            )  # fmt: skip
            found = [row for p in args.precision for row in our_rows(name, batch, p, result)]
            memory = {}
            if args.memory:
                memory = peak_memory(dense, x, compiled=result.compiled.get(("static", "float32")))
            print(
                f"\n{name}, batch {batch}\n\n{dense_table(result, memory)}\n\n{our_table(found)}", flush=True
            )
            for engine, reason in result.left_out.items():
                print(f"\n{TITLES[engine]} left out: {reason}")
            rows += [
                {**row, "dense": result.dense, "memory_mb": memory, "left_out": result.left_out}
                for row in found
            ]
    return rows


def runners(dynamic: torch.nn.Module | None, densities: list[float]) -> list[Runner]:
    """What races against the static network."""
    if dynamic is None:
        return []
    if not dc.gates(dynamic):
        return [Runner("dynamic kernels", dynamic)]
    return [Runner(f"density {density:g}", dynamic, density) for density in sorted(densities, reverse=True)]


def our_rows(name: str, batch: int, precision: str, result: Race) -> list[dict]:
    """Our engine on the static network and on the dynamic ones, against the fastest dense rival."""
    ours = OURS[precision]
    if ours not in result.dense:
        return []
    kernels = "dynamic kernels" in result.dynamic
    # Dynamic kernels are compared with the same engine on the static network: what they cost.
    rival = ours if kernels else result.fastest(precision, ours=False)
    entries = [("static", None, result.dense, 1.0)]
    entries += [
        (label, result.dynamic[label].get("eager"), result.dynamic[label], result.macs_ratio[label])
        for label in result.dynamic
    ]
    base = result.dense[rival]
    return [
        {
            "network": name, "batch": batch, "precision": precision, "masks": label, "macs_ratio": macs_ratio,
            "ours": times[ours], "rival": rival, "rival_times": base, "eager": eager,
            "ratio_min": times[ours]["min_ms"] / base["min_ms"],
            "ratio_median": times[ours]["median_ms"] / base["median_ms"],
            "limit": limit(name, batch, precision, label, macs_ratio, result.dense),
            "deviation": result.deviations[f"{label}/{ours}"],
        }
        for label, eager, times, macs_ratio in entries
        if ours in times
    ]  # fmt: skip


def dense_table(result: Race, memory: dict) -> str:
    """Every dense engine on the static network."""
    header = ["static network", *(TITLES[name] for name in result.dense)]
    rows = [["ms", *(ms(times) for times in result.dense.values())]]
    if memory:
        cells = [memory.get(name) for name in result.dense]
        rows.append(["peak MB", *(digits(c) if isinstance(c, float) else c for c in cells)])
    return markdown(header, rows)


def our_table(rows: list[dict]) -> str:
    """Ours against the fastest dense rival."""
    header = (
        "network", "batch", "precision", "masks", "MAC ratio", "ours, ms", "fastest rival", "its ms", "ratio",
        "limit", "eager executor, ms",
    )  # fmt: skip
    cells = [
        (
            r["network"], r["batch"], r["precision"], r["masks"], f"{r['macs_ratio']:.3f}", ms(r["ours"]),
            TITLES[r["rival"]], ms(r["rival_times"]), f"{r['ratio_min']:.2f} / {r['ratio_median']:.2f}",
            r["limit"] and f"{r['limit']:.2f}", ms(r["eager"]),
        )
        for r in rows
    ]  # fmt: skip
    return markdown(header, cells)


if __name__ == "__main__":
    sys.exit(main())
