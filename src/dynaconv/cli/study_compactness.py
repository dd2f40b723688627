"""`dynaconv study compactness`: accuracy against parameters and MACs at equal schedule."""

from __future__ import annotations

from typing import Any

from dynaconv import _checks
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import need_static_name
from dynaconv.cli.outcome import DONE, FAILED, Outcome, say
from dynaconv.cli.resuming import resumable

HELP = "accuracy against parameters and MACs of a static network and its dynamic versions"
DESCRIPTION = """
Trains a small static network and its versions with dynamic kernels, all with the same pictures, schedule and
seeds, and compares accuracy, parameters, multiply-adds (static, mixing, routing) and milliseconds. Every
finished row is kept: the same command goes on where it stopped, and more --methods or --seeds add rows.
Without --data it uses the embedded scenes and takes minutes."""
EXAMPLES = """\
dynaconv study compactness
dynaconv study compactness --methods static dyconv4 dcd --seeds 3 --out runs/small
dynaconv study compactness --data cifar10:DIR --network resnet8_cifar --width 16 --epochs 15 --seeds 3"""
DEFAULT = ["static", "condconv", "dyconv", "dynet", "dcd", "odconv"]


def add_arguments(parser: Any) -> None:
    """The data, the networks, the schedule."""
    parser.add_argument(
        "--data", type=str, default="scenes", help="scenes, imagefolder:DIR or cifar10:DIR (default scenes)"
    )
    parser.add_argument("--image-size", type=int, default=None, help="side of the pictures in pixels")
    parser.add_argument("--train-size", type=int, default=None, help="training pictures; left out, all")
    parser.add_argument("--network", type=str, default=None, help="static network, a name of dynaconv models")
    parser.add_argument("--width", type=int, default=None, help="its channels, where it has that option")
    parser.add_argument(
        "--methods",
        type=str,
        nargs="+",
        default=DEFAULT,
        help="static, condconv, dyconv, dynet, dcd, odconv, weightnet; dyconv4: 4 experts, static16: width 16",
    )
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each network, seeds 0, 1, ...")
    parser.add_argument("--epochs", type=int, default=None, help="of every training")
    parser.add_argument("--batch", type=int, default=None, help="pictures in a training step")
    parser.add_argument("--lr", type=float, default=None, help="highest learning rate")
    parser.add_argument(
        "--anneal",
        type=float,
        default=None,
        help="share of training over which the temperature of DY-Conv and ODConv falls from 30 to 1",
    )
    parser.add_argument("--precision", type=str, default=None, help="auto, fp32 or bf16")
    parser.add_argument("--time-batch", type=int, nargs="*", default=[1, 32], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved timings of each network")
    parser.add_argument("--out", type=str, default="runs/compactness", help="folder of the study")
    parser.add_argument("--quiet", action="store_true", help="no line for every epoch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Any) -> Outcome:
    """Train what is missing, compare, show; exit code 1 where a training diverged.

    Raises:
        ValueError: bad input; CommandFailed: interrupted.
    """
    from dynaconv.study.compactness import compactness
    from dynaconv.study.compactness_table import table
    from dynaconv.study.methods import parse_methods

    settings, methods = _settings(args), parse_methods(args.methods)
    folder = output_folder(args.out)
    with resumable("rows"):
        data = compactness(
            settings,
            methods,
            args.seeds,
            folder,
            batches=tuple(args.time_batch),
            rounds=args.rounds,
            progress=_rows_only if args.quiet else say,
        )
    text = [table(data["methods"]), f"CSV, JSON and figure in {folder}"]
    diverged = [row for row in data["rows"] if "diverged" in row]
    text += [f"diverged: {row['method']} seed {row['seed']}: {row['diverged']}" for row in diverged]
    return Outcome("\n".join(text), {"out": folder, **data}, FAILED if diverged else DONE)


def _settings(args: Any) -> Any:
    from dynaconv.study.settings import default_settings

    for option, values in {
        "--seeds": [args.seeds],
        "--rounds": [args.rounds],
        "--time-batch": args.time_batch,
    }.items():
        for value in values:
            _checks.cli_at_least(option, value, 1)
    need_static_name(args.network)
    return default_settings(
        args.data,
        image_size=args.image_size,
        train_size=args.train_size,
        network=args.network,
        width=args.width,
        epochs=args.epochs,
        batch_size=args.batch,
        lr=args.lr,
        anneal=args.anneal,
        precision=args.precision,
    )


def _rows_only(line: str) -> None:
    if " left" in line:
        say(line)
