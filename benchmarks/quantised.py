"""Post-training static quantisation of an exported run with ONNX Runtime's own tools: accuracy and time.

    .venv/bin/python benchmarks/quantised.py runs/demo
    .venv/bin/python benchmarks/quantised.py runs/demo --target 0.5 --count 2000 --batch 1 32

Each file is quantised with weights and activations of 8 bits (QDQ), calibrated on pictures of the run's calibration
split: the dense twin without gates, and the masked network in both lowerings. Accuracy is that of the test split; times
are interleaved in one process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
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


def main() -> int:
    """Export, quantise, compare."""
    args = parse()
    torch.set_num_threads(args.threads or torch.get_num_threads())
    print(machine_line())
    opened = open_network(args.run)
    targets = calibrated_targets(opened.model)
    target = args.target or sorted(targets)[len(targets) // 2]
    set_target(opened.model, target)
    bundle = run_dataset(opened)
    calibration = bundle.calibration.__getitems__(
        list(range(min(args.calibration, len(bundle.calibration))))
    )[0]
    x, labels = bundle.test.__getitems__(list(range(min(args.count, len(bundle.test)))))
    rows, runs = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for name, model, lowering in (
            ("static", dense_twin(opened.model), "dense"),
            (f"target {target:g}, dense", opened.model, "dense"),
            (f"target {target:g}, sparse", opened.model, "sparse"),
        ):
            feed = default_feed(model, "budget") if dc.gates(model) else {}
            plain = Path(folder) / f"{len(rows)}.onnx"
            dc.export.onnx(model, (x[:2],), plain, lowering=lowering, check=False)
            whole = plain.with_suffix(".int8.onnx")
            quantise(plain, whole, calibration.numpy(), feed, args.ops)
            for kind, file in (("float32", plain), ("int8", whole)):
                run = load("ort", file, torch.get_num_threads())
                right = accuracy(run, feed, x.numpy(), np.asarray(labels))
                rows.append((name, kind, right, file.stat().st_size / 1e6))
                for batch in args.batch:
                    inputs = {"images": x[:batch].numpy(), **feed}
                    runs[f"{name}/{kind}/{batch}"] = lambda run=run, inputs=inputs: run(inputs)
        times = compare_latency(runs, rounds=args.rounds, seconds=args.seconds, settle_seconds=SETTLE_SECONDS)
    header = ("network", "numbers", "accuracy", "file, MB", *(f"ms, batch {b}" for b in args.batch))
    cells = [
        (name, kind, f"{right:.4f}", f"{size:.2f}", *(ms(times[f"{name}/{kind}/{b}"]) for b in args.batch))
        for name, kind, right, size in rows
    ]
    print(f"\n{args.run}, {len(x)} test pictures\n\n{markdown(header, cells)}")
    return 0


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("run", help="a finished run, e.g. of `dynaconv demo`")
    add("--target", type=float, help="calibrated budget; the middle one if left out")
    add("--count", type=int, default=1000, help="test pictures")
    add("--calibration", type=int, default=200, help="pictures that ranges come from")
    add("--ops", nargs="+", default=["Conv", "MatMul", "Gemm"], help="operators that become 8-bit")
    add("--batch", type=int, nargs="+", default=[1, 32])
    add("--rounds", type=int, default=25)
    add("--seconds", type=float, help="begin no further round after so long")
    add("--threads", type=int, help="default torch's own number")
    return parser.parse_args()


def accuracy(run, feed: dict, pictures: np.ndarray, labels: np.ndarray) -> float:
    """Share of right answers."""
    found = [
        run({"images": pictures[i : i + 50], **feed})["output"].argmax(1) for i in range(0, len(pictures), 50)
    ]
    return float((np.concatenate(found) == labels).mean())


def quantise(plain: Path, whole: Path, pictures: np.ndarray, feed: dict, ops: list[str]) -> None:
    """ONNX Runtime's static quantisation; what decides masks stays in float32."""
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Pictures(CalibrationDataReader):
        """One picture after the other."""

        def __init__(self) -> None:
            self.left = iter([{"images": picture[None], **feed} for picture in pictures])

        def get_next(self) -> dict | None:
            """The next feed."""
            return next(self.left, None)

    ready = plain.with_suffix(".ready.onnx")
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
