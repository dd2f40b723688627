"""Post-training static quantisation of an exported run with ONNX Runtime's own tools: accuracy and time.

    .venv/bin/python benchmarks/quantised.py runs/demo
    .venv/bin/python benchmarks/quantised.py runs/demo --target 0.5 --count 2000 --batch 1 32
    .venv/bin/python benchmarks/quantised.py --network timm:resnet50 --densities 0.25 0.5 --calibration 8 --batch 1 8

Each file is quantised with weights and activations of 8 bits (QDQ), calibrated on pictures of the run's calibration
split: the dense twin without gates, and the masked network in both lowerings. Accuracy is that of the test split; times
are interleaved in one process. A network has random weights with settled batch norms, noise for pictures and forced
masks: time, and how far 8 bits are from the float32 file.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from export import Files
from tables import markdown, ms

import dynaconv as dc
from dynaconv.budget.calibration import calibrated_targets
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.networks import open_network, set_target
from dynaconv.cost import compare_latency, machine_line
from dynaconv.export.api import default_feed
from dynaconv.export.runtimes import load
from dynaconv.measure import dense_twin
from dynaconv.measure.race import SETTLE_SECONDS
from dynaconv.measure.untrained import settle_norms_
from dynaconv.testing import forced


@dataclass
class Subject:
    """A float32 file, what it is calibrated with, and what it is fed at each batch; judge(run) is put in the table."""

    name: str
    plain: Path
    calibration: list[dict]
    feeds: dict[int, dict]
    judge: Callable[[Callable], str]


def main() -> int:
    """Export, quantise, compare."""
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(machine_line())
    rows, runs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        subjects = of_run if args.run else of_network
        kept = args.folder or Path(folder)
        for subject in subjects(args, kept):
            whole = kept / f"{subject.name}.int8.onnx"
            if not whole.exists():
                quantise(subject.plain, whole, subject.calibration, args.ops)
            for kind, file in (("float32", subject.plain), ("int8", whole)):
                run = load("ort", file, torch.get_num_threads())
                rows.append((subject.name, kind, subject.judge(run), file.stat().st_size / 1e6))
                for batch, feed in subject.feeds.items():
                    runs[f"{subject.name}/{kind}/{batch}"] = lambda run=run, feed=feed: run(feed)
        times = compare_latency(runs, rounds=args.rounds, seconds=args.seconds, settle_seconds=SETTLE_SECONDS)
    measure = "accuracy" if args.run else "off by"
    header = ("network", "numbers", measure, "file, MB", *(f"ms, batch {b}" for b in args.batch))
    cells = [
        (name, kind, judged, f"{size:.2f}", *(ms(times[f"{name}/{kind}/{b}"]) for b in args.batch))
        for name, kind, judged, size in rows
    ]
    print(f"\n{args.run or args.network}\n\n{markdown(header, cells)}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", nargs="?", help="a finished run, e.g. of `dynaconv demo`")
    add("--target", type=float, help="calibrated budget of the run; the middle one if left out")
    add("--count", type=int, default=1000, help="test pictures of the run")
    add("--network", help="instead of a run: a network with random weights, e.g. timm:resnet50")
    add("--densities", type=float, nargs="+", default=[0.25, 0.5], help="of the network's forced masks")
    add("--calibration", type=int, default=200, help="pictures that ranges come from")
    add("--ops", nargs="+", default=["Conv", "MatMul", "Gemm"], help="operators that become 8-bit")
    add("--batch", type=int, nargs="+", default=[1, 32])
    add("--rounds", type=int, default=25)
    add("--seconds", type=float, help="begin no further round after so long")
    add("--threads", type=int, help="default torch's own number")
    add("--folder", type=Path, help="keep the files there, and use those that lie there")
    args = parser.parse_args()
    if bool(args.run) == bool(args.network):
        parser.error("give a run or --network")
    return args


def of_run(args: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The dense twin without gates, and the masked network in both lowerings; judged by accuracy."""
    opened = open_network(args.run)
    targets = calibrated_targets(opened.model)
    target = args.target or sorted(targets)[len(targets) // 2]
    set_target(opened.model, target)
    bundle = run_dataset(opened)
    calibration = bundle.calibration.__getitems__(
        list(range(min(args.calibration, len(bundle.calibration))))
    )[0]
    x, labels = bundle.test.__getitems__(list(range(min(args.count, len(bundle.test)))))
    for name, model, lowering in (
        ("static", dense_twin(opened.model), "dense"),
        (f"target {target:g}, dense", opened.model, "dense"),
        (f"target {target:g}, sparse", opened.model, "sparse"),
    ):
        feed = default_feed(model, "budget") if dc.gates(model) else {}
        plain = folder / f"{name}.onnx"
        dc.export.onnx(model, (x[:2],), plain, lowering=lowering, winograd=False, check=False)
        yield Subject(
            name,
            plain,
            [{"images": picture[None], **feed} for picture in calibration.numpy()],
            {batch: {"images": x[:batch].numpy(), **feed} for batch in args.batch},
            lambda run, feed=feed: f"{accuracy(run, feed, x.numpy(), np.asarray(labels)):.4f}",
        )


def of_network(args: argparse.Namespace, folder: Path) -> Iterator[Subject]:
    """The static network, and the sparse one at each density of forced masks; judged by the error of its outputs."""
    size = (3, 224, 224)
    torch.manual_seed(0)
    static = settle_norms_(dc.create_model(args.network), torch.randn(4, *size))
    shape = argparse.Namespace(input_size=size, masks="forced", kernels=None, gates="SpatialMasking")
    files = Files(args.network, static, shape, folder, winograd=False)
    noise = torch.Generator().manual_seed(1)
    calibration, tests = (torch.randn(n, *size, generator=noise) for n in (args.calibration, 8))
    for density in (None, *args.densities):
        path = files.file("static" if density is None else "sparse", 1.0, 1)

        def fed(x: torch.Tensor, density: float | None = density) -> dict:
            masks = [] if density is None else forced(files.dynamic, x, density)
            return {f"input_{i}" if i else "images": t.numpy() for i, t in enumerate((x, *masks))}

        judged = fed(tests)
        exact = load("ort", path)(judged)["output"]
        yield Subject(
            "static" if density is None else f"density {density:g}, sparse",
            path,
            [fed(x[None]) for x in calibration],
            {batch: fed(torch.randn(batch, *size, generator=noise)) for batch in args.batch},
            lambda run, exact=exact, feed=judged: f"{off(run(feed)['output'], exact):.3f}",
        )


def off(got: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the error over that of the outputs."""
    return float(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)))


def accuracy(run, feed: dict, pictures: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    found = [
        run({"images": pictures[i : i + 50], **feed})["output"].argmax(1) for i in range(0, len(pictures), 50)
    ]
    return float((np.concatenate(found) == labels).mean())


def quantise(plain: Path, whole: Path, feeds: list[dict], ops: list[str]) -> None:
    """ONNX Runtime's static quantisation; what decides masks stays in float32."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        """One picture after the other."""

        def __init__(self) -> None:
            self.left = iter(feeds)

        def get_next(self) -> dict | None:
            """The next feed."""
            return next(self.left, None)

    ready = whole.with_suffix(".ready.onnx")
    quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    quantize_static(
        str(ready), str(whole), Pictures(), quant_format=QuantFormat.QDQ, op_types_to_quantize=ops, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, nodes_to_exclude=deciding(ready),
    )  # fmt: skip


def deciding(path: Path) -> list[str]:
    """Names of the nodes between a map and a comparison with a threshold: the gates."""
    import onnx

    graph = onnx.load(path).graph
    maker = {name: node for node in graph.node for name in node.output}
    waiting = [n.input[0] for n in graph.node if n.op_type == "GreaterOrEqual"]
    waiting += [n.input[1] for n in graph.node if n.op_type == "GreaterOrEqual"]
    small = (
        "Conv",
        "MatMul",
        "Gemm",
        "Reshape",
        "Transpose",
        "GlobalAveragePool",
        "Add",
        "Sub",
        "Squeeze",
        "Unsqueeze",
    )
    found, depth = [], dict.fromkeys(waiting, 0)
    while waiting:
        name = waiting.pop()
        node = maker.get(name)
        if node is None or node.op_type not in small or depth[name] > 2:
            continue
        found.append(node.name)
        products = node.op_type in ("Conv", "MatMul", "Gemm")
        for before in node.input:
            if before not in depth:
                depth[before] = depth[name] + products
                waiting.append(before)
        if products and depth[name] == 1:
            continue
    return found


if __name__ == "__main__":
    sys.exit(main())
