"""`dynaconv bench`: milliseconds of every engine, dense and dynamic, interleaved, after checking that they agree."""

from __future__ import annotations

from typing import Any

from dynaconv import _checks
from dynaconv.cli import bench_exported, bench_networks
from dynaconv.cli.bench_kernels import run_kernels
from dynaconv.cli.networks import check_input_size, open_network
from dynaconv.cli.outcome import Outcome

HELP = "measure milliseconds: dense engines, ours, dynamic"
DESCRIPTION = """
First checks that skipping gives the numbers that computing everything gives, and that our engine gives those of
eager PyTorch (exit code 1 when not, and no times). Then times the static network with every dense engine that is
installed, and the dynamic one with our engine and in eager PyTorch. Rounds are interleaved in one process with equal
threads, so that a noisy machine disturbs all alike; minimum and median are shown, with the share of MACs beside the
share of milliseconds. For a run the masks come from pictures of its own data set; a network by name gets forced
blob-shaped masks, because its gates are not trained: with --force-density any static network shows what masks would
buy. `dynaconv bench kernels` times the strategies of dynamic convolutions instead, against the static convolution
and timm's layer; with --write it makes the table by which execution="auto" chooses."""
EXAMPLES = """\
dynaconv bench timm:resnet50 --force-density 0.5
dynaconv bench runs/demo
dynaconv bench runs/demo --target 0.3 --batch 1 8 32 --threads 1
dynaconv bench timm:mobilenetv2_100 --force-density 0.25 0.5 --engines onnxruntime --json
dynaconv bench runs/demo --engines ort openvino dynaconv
dynaconv bench runs/demo/model.onnx --engines ort openvino
dynaconv bench kernels"""
# Of a run, and of a network by name, which is often large.
BATCHES, NAMED_BATCHES = [1, 32], [1]


def add_arguments(parser: Any) -> None:
    """The network, its masks, how to time."""
    parser.add_argument(
        "model",
        help="a run folder, a saved network, a name of `dynaconv models`, timm:, torchvision:, an .onnx file that "
        "`dynaconv export` wrote, or kernels",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=None,
        help="batch sizes to time, in pictures (default 1 32; a network by name: 1; kernels: 1 8 32)",
    )
    parser.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=None,
        help="calibrated budgets; left out, all that the run has",
    )
    parser.add_argument(
        "--force-density",
        type=float,
        nargs="+",
        default=None,
        help="force masks with these shares of open positions, 0..1; a static network is converted for it",
    )
    parser.add_argument(
        "--dynamize", action="store_true", help="convert a static network first (dc.dynamize_)"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        default=None,
        metavar=("C", "H", "W"),
        help="picture in pixels, for noise",
    )
    parser.add_argument(
        "--engines",
        type=str,
        nargs="+",
        default=None,
        help="dense engines beside eager PyTorch and ours: onnxruntime, openvino-f32, openvino, inductor (takes a "
        "minute), all or none; left out, all but inductor. With ort or dynaconv among them (ort, openvino, dynaconv, "
        "eager) the network itself is exported and runs in each: accuracy, MACs, ms",
    )
    parser.add_argument(
        "--precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="that our engine computes in",
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="threads of every engine; left out, torch's own number"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=None,
        help="interleaved measurements of each (left out, 8 s of them; kernels: 7)",
    )
    parser.add_argument(
        "--write", action="store_true", help="kernels: make the table that execution='auto' reads"
    )
    parser.add_argument(
        "--layout",
        choices=("both", "contiguous", "channels-last"),
        default="both",
        help="kernels: memory format of the input",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: Any) -> Outcome:
    """Check, time, show.

    Raises:
        ValueError: bad input; CommandFailed: skipping and computing everything disagree, or two engines do.
    """
    from dynaconv.measure.race import torch_threads

    _check_numbers(args)
    if args.model == "kernels":
        with torch_threads(args.threads):
            return run_kernels(args)
    if bench_exported.asked_for(args.model, args.engines):
        return bench_exported.run(args)
    if args.write:
        raise ValueError("--write makes the table of `dynaconv bench kernels`; networks have none")
    args.engines = choose_engines(args.engines)
    opened = open_network(args.model)
    args.batch = args.batch or (NAMED_BATCHES if opened.folder is None else BATCHES)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    check_input_size(size, opened.model)
    dense = bench_networks.prepare(opened, size, args)
    with torch_threads(args.threads):
        return bench_networks.measure(opened, dense, size, args)


def choose_engines(names: list[str] | None) -> list[str] | None:
    """Dense rivals by name, eager PyTorch always among them; None is all that start quickly.

    Raises:
        ValueError: an unknown name.
    """
    from dynaconv.measure.rivals import RIVALS

    if names is None:
        return None
    known = [*RIVALS, "all", "none"]
    for name in names:
        _checks.one_of("engine", name, known)
    return list(RIVALS) if "all" in names else ["eager", *(name for name in names if name != "none")]


def _check_numbers(args: Any) -> None:
    for batch in args.batch or ():
        _checks.cli_at_least("--batch", batch, 1)
    if args.rounds is not None:
        _checks.cli_at_least("--rounds", args.rounds, 1)
    if args.threads is not None:
        _checks.cli_at_least("--threads", args.threads, 1)
    for density in args.force_density or ():
        if not 0 <= density <= 1:
            raise _checks.cli_density("--force-density", density)
    if args.force_density is not None and args.target is not None:
        raise ValueError(
            "--target and --force-density exclude each other: masks are either decided or forced"
        )
