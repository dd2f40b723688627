"""Exported networks in stock runtimes: sparse ONNX against the static network in the same runtime, interleaved.

    make setup && .venv/bin/python benchmarks/export.py                     ResNet-50 and MobileNetV2, ONNX Runtime
    .venv/bin/python benchmarks/export.py --engines openvino --rounds 10
    .venv/bin/python benchmarks/export.py --check                           exit code 1 where a promise is broken

    .venv/bin/python benchmarks/export.py --masks own --lowering dense      the file that is deployed: gates decide

Masks are forced (blob-like, exact density, in every block) and are inputs of the graph; the gates still compute, and
a product and an addition for each gate bring the mask in. With `--masks own` the graph has no such inputs: the gates
decide, by thresholds that are set one by one so that each gate opens the share that is asked on other noise.
Weights are random with settled batch norms, pictures are noise. Files are exported to be fast for the batch that
they are then timed on; their free batch is fixed at loading.
Each file is compared with eager PyTorch on the same masks before anything is timed; while one differs, no number is
printed. A speed-up is milliseconds of the static network over those of the exported one, minimum / median.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path

import torch
from tables import markdown, ms

import dynaconv as dc
from dynaconv.cost import compare_latency, machine_line
from dynaconv.export.runtimes import load
from dynaconv.measure.race import SETTLE_SECONDS
from dynaconv.measure.untrained import settle_norms_
from dynaconv.testing import MaskInputs, forced

TOLERANCE = 1e-4
TITLES = {"ort": "ONNX Runtime", "openvino": "OpenVINO"}
# (network, lowering, density) -> speed-up in ONNX Runtime that the project promises.
PROMISES = {("timm:resnet50", "sparse", 0.5): 1.25, ("timm:resnet50", "sparse", 0.25): 1.9}
FLOORS = {("timm:mobilenetv2_100", "auto"): 1 / 1.05}


def main() -> int:
    """Export, compare, time, show."""
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(machine_line())
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in args.networks:
            # The same weights whichever networks are asked for, so that files that were kept can be used again.
            torch.manual_seed(0)
            model = settle_norms_(dc.create_model(name), torch.randn(4, *args.input_size))
            files = Files(name, model, args, args.folder or Path(folder))
            for batch in args.batch:
                for engine in args.engines:
                    rows += race(files, engine, batch, args)
    print(f"\n{table(rows)}")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1) + "\n")
    missed = [row for row in rows if row["limit"] and row["speedup_min"] < row["limit"]]
    for row in missed if args.check else ():
        where = f"{row['network']}, batch {row['batch']}, {row['lowering']}, density {row['density']:g}"
        print(f"missed: {where}: {row['speedup_min']:.2f}, promised {row['limit']:.2f}")
    return int(bool(args.check and missed))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--networks", nargs="+", default=["timm:resnet50", "timm:mobilenetv2_100"])
    add("--engines", nargs="+", choices=tuple(TITLES), default=["ort"])
    add("--lowering", nargs="+", choices=("sparse", "auto", "dense"), default=["sparse", "auto"])
    add("--masks", choices=("forced", "own"), default="forced", help="inputs, or what the gates decide")
    add("--kernels", help="masked blocks also get kernels for each image: DYConv, CondConv, ODConv, ...")
    add("--gates", default="SpatialMasking", help="what decides in blocks: SpatialMasking, ChannelGate, ...")
    add("--densities", type=float, nargs="+", default=[0.25, 0.5, 1.0], help="of the masks, 0..1")
    add("--batch", type=int, nargs="+", default=[1, 8], help="images in a batch")
    add("--rounds", type=int, default=15, help="interleaved rounds")
    add("--seconds", type=float, help="begin no further round after so long")
    add("--threads", type=int, help="default torch's own number")
    add("--input-size", type=int, nargs=3, default=[3, 224, 224], metavar=("C", "H", "W"))
    add("--check", action="store_true", help="exit code 1 where a promise is broken in ONNX Runtime")
    add("--folder", type=Path, help="keep the exported files there, and use those that lie there")
    add("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


class Files:
    """Exported files of one network: the static one, and the masked one for each lowering, density and batch."""

    def __init__(
        self,
        name: str,
        static: torch.nn.Module,
        args: argparse.Namespace,
        folder: Path,
        winograd: bool = True,
    ) -> None:
        self.winograd = winograd
        self.name, self.folder, self.size, self.own = name, folder, args.input_size, args.masks == "own"
        self.static, self.dynamic = static, copy.deepcopy(static)
        kernels = () if args.kernels is None else (getattr(dc, args.kernels)(),)
        dc.dynamize_(self.dynamic, (getattr(dc, args.gates)(), *kernels), input_size=tuple(self.size))
        self.dynamic.eval()
        self.given = MaskInputs(copy.deepcopy(self.dynamic)).eval()
        self.made: dict[str, Path] = {}
        self.blocks: dict[str, dict[str, str]] = {}

    def file(self, lowering: str, density: float, batch: int) -> Path:
        """The path; written at the first call. Only "auto" and gates of their own depend on the density."""
        key = self.key(lowering, density, batch)
        if key not in self.made:
            path = self.folder / f"{self.name.replace(':', '-')}-{key}.onnx"
            x = torch.randn(1, *self.size)
            model, inputs = (self.static, (x,)) if lowering == "static" else self.masked(x, density)
            options = {"lowering": "dense" if lowering == "static" else lowering, "dial": None, "report": ()}
            options |= {"densities": density if lowering == "auto" else None, "batch": batch, "check": False}
            options["winograd"] = self.winograd
            if not path.exists():
                dc.export.onnx(model, inputs, path, **options)
            self.made[key], self.blocks[key] = path, dc.export.read_metadata(path)["lowering"]
        return self.made[key]

    def key(self, lowering: str, density: float, batch: int) -> str:
        """What the file is kept under."""
        if lowering == "static":
            return lowering
        kind = f"own-{lowering}" if self.own else lowering
        kind = f"{kind}{density:g}" if lowering == "auto" or self.own else kind
        return f"{kind}-b{batch}"

    def masked(self, x: torch.Tensor, density: float) -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
        """The masked network at a density, and what it takes for x [N, C, H, W]."""
        if self.own:
            noise = torch.randn(2, *self.size, generator=torch.Generator().manual_seed(2))
            return open_share(copy.deepcopy(self.dynamic), noise, density), (x,)
        return self.given, (x, *forced(self.dynamic, x, density))

    def sparse_blocks(self, lowering: str, density: float, batch: int) -> str:
        """How many blocks were written sparse, of how many."""
        kinds = list(self.blocks[self.key(lowering, density, batch)].values())
        return f"{kinds.count('sparse')} of {len(kinds)}"


@torch.no_grad()
def open_share(model: torch.nn.Module, x: torch.Tensor, density: float) -> torch.nn.Module:
    """Set the thresholds, gate by gate, so that each opens this share of the positions of x [N, C, H, W]."""

    def settle(gate: torch.nn.Module, args: tuple, _output: torch.Tensor) -> torch.Tensor:
        logits = gate.logits(*args)
        gate.threshold.copy_(logits.quantile(1 - density) if density < 1 else torch.tensor(-torch.inf))
        return gate.decide(logits)

    handles = [gate.register_forward_hook(settle) for gate in dc.gates(model).values()]
    model(x)
    for handle in handles:
        handle.remove()
    return model


def race(files: Files, engine: str, batch: int, args: argparse.Namespace) -> list[dict]:
    """Rows of one network in one runtime at one batch."""
    x = torch.randn(batch, *args.input_size, generator=torch.Generator().manual_seed(1))
    threads = torch.get_num_threads()
    cases = {("static", 1.0): (files.file("static", 1.0, batch), files.static, (x,))}
    for lowering in args.lowering:
        for density in args.densities:
            cases[lowering, density] = (files.file(lowering, density, batch), *files.masked(x, density))
    runs, loaded = {}, {}
    for case, (path, model, inputs) in cases.items():
        if path not in loaded:
            loaded[path] = load(engine, path, threads, batch)
        feed = {f"input_{i}" if i else "images": t.numpy() for i, t in enumerate(inputs)}
        compare(loaded[path](feed)["output"], model, inputs, f"{files.name}, {engine}, {case}")
        runs[str(case)] = lambda run=loaded[path], feed=feed: run(feed)
    times = compare_latency(runs, rounds=args.rounds, seconds=args.seconds, settle_seconds=SETTLE_SECONDS)
    base = times[str(("static", 1.0))]
    # The promises are for masks alone.
    masked = args.kernels is None and args.gates == "SpatialMasking"
    return [
        {
            "network": files.name, "engine": engine, "batch": batch, "lowering": lowering, "density": density,
            "blocks": files.sparse_blocks(lowering, density, batch), "ms": times[str((lowering, density))],
            "static_ms": base, "limit": promised(files.name, engine, lowering, density) if masked else None,
            "speedup_min": base["min_ms"] / times[str((lowering, density))]["min_ms"],
            "speedup_median": base["median_ms"] / times[str((lowering, density))]["median_ms"],
        }
        for lowering, density in list(cases)[1:]
    ]  # fmt: skip


def compare(got, model: torch.nn.Module, inputs: tuple, where: str) -> None:
    """Leave unless the runtime computes what eager PyTorch computes."""
    with torch.no_grad():
        expected = model(*inputs).numpy()
    error = abs(got - expected).max() / abs(expected).max()
    if not error <= TOLERANCE:
        sys.exit(f"{where}: off by {error:.1e} of the largest magnitude; nothing was timed")


def promised(network: str, engine: str, lowering: str, density: float) -> float | None:
    """The least speed-up, or None."""
    if engine != "ort":
        return None
    return PROMISES.get((network, lowering, density), FLOORS.get((network, lowering)))


def table(rows: list[dict]) -> str:
    """As docs/benchmarks.md shows it."""
    header = (
        "network", "runtime", "batch", "static, ms", "lowering", "blocks sparse", "density", "ms", "speed-up",
        "promised",
    )  # fmt: skip
    cells = [
        (
            r["network"], TITLES[r["engine"]], r["batch"], ms(r["static_ms"]), r["lowering"], r["blocks"],
            f"{r['density']:g}", ms(r["ms"]), f"{r['speedup_min']:.2f} / {r['speedup_median']:.2f}",
            r["limit"] and f"{r['limit']:.2f}",
        )
        for r in rows
    ]  # fmt: skip
    return markdown(header, cells)


if __name__ == "__main__":
    sys.exit(main())
