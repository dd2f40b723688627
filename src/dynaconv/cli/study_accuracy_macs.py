"""`dynaconv study accuracy-macs`: accuracy against multiply-adds and milliseconds, dynamic and static."""

from __future__ import annotations

from typing import Any

from dynaconv import _checks
from dynaconv.cli.budget_options import add_options, schedule_of
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import need_static_name
from dynaconv.cli.outcome import DONE, FAILED, Outcome, say
from dynaconv.cli.resuming import resumable

HELP = "accuracy against executed MACs and milliseconds: static networks and every kind of gate"
DESCRIPTION = """
Trains static networks of several widths from scratch, and from one dense start for each seed dynamic ones: DynConv
and its rivals at several budgets, with random masks and cut channels as controls. All see the same number of epochs.
Budgets are shares of the full static network's multiply-adds, gates included, so that methods are compared at equal
cost. Then all are timed in turns: static networks in their fastest engine, dynamic ones in ours; the table says
which dynamic networks beat the static ones, and which do not. The size of pictures and of the object in them are axes
of their own. Seed by seed; every finished network is kept: the same command goes on where it stopped, and more
--methods, --budgets, --widths, --seeds, --image-sizes or --object-shares add rows."""
EXAMPLES = """\
dynaconv study accuracy-macs
dynaconv study accuracy-macs --methods dense dynconv layer-gate --budgets 0.4 0.6 --seeds 3
dynaconv study accuracy-macs --methods dense dynconv --image-sizes 32 48 64 --out runs/sizes
dynaconv study accuracy-macs --methods dense dynconv --budgets 0.3 --object-shares 0.25 0.1 0.04 0.01 --out runs/objects
dynaconv study accuracy-macs --data cifar10:DIR --network resnet20_cifar --epochs 20"""
SHARE_SIZE, SCENES_SIZE, CIFAR_SIZE = 96, 64, 32


def add_arguments(parser: Any) -> None:
    """The axes, the data, the schedule, the timing."""
    parser.add_argument(
        "--methods",
        type=str,
        nargs="+",
        default=["dense", "dynconv", "layer-gate", "halting", "random", "narrow"],
        help="dense (static networks), dynconv, layer-gate, halting, halting-image, channel-gate, random, narrow",
    )
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.3, 0.5, 0.7],
        help="shares of the full static network's multiply-adds, ascending (default 0.3 0.5 0.7)",
    )
    parser.add_argument(
        "--widths",
        type=int,
        nargs="+",
        default=[],
        help="of the static networks; left out, those that cost as much",
    )
    parser.add_argument(
        "--image-sizes",
        type=int,
        nargs="+",
        default=[],
        help="sides of the pictures in pixels, each a set of networks",
    )
    parser.add_argument(
        "--object-shares",
        type=float,
        nargs="+",
        default=[],
        help="shares of the picture that the digit of scenes covers, each a set of networks",
    )
    add_options(parser, "runs/accuracy-macs", image_size=False)
    parser.add_argument(
        "--no-hold",
        action="store_true",
        help="leave to calibration what a training misses of its budget, instead of aiming lower while it trains",
    )
    parser.add_argument(
        "--no-times", action="store_true", help="train only; milliseconds measured before are kept"
    )
    parser.add_argument("--time-batch", type=int, nargs="+", default=[1, 32], help="batch sizes to time")
    parser.add_argument("--rounds", type=int, default=15, help="interleaved timings of each network")
    parser.add_argument(
        "--seconds", type=float, default=20.0, help="most seconds of timing for each batch size"
    )
    parser.add_argument(
        "--engines",
        type=str,
        nargs="+",
        default=None,
        help="of static networks; left out, all that start quickly",
    )
    parser.add_argument("--threads", type=int, default=None, help="of every engine while timing")


def run(args: Any) -> Outcome:
    """Train what is missing, compare, time, draw; exit code 1 where a training diverged.

    Raises:
        ValueError: bad input; CommandFailed: interrupted.
    """
    from dynaconv.study.accuracy_macs import accuracy_macs
    from dynaconv.study.curve_table import table

    settings, axes, timing = _settings(args), _axes(args), _timing(args)
    folder = output_folder(args.out)
    with resumable():
        data = accuracy_macs(
            settings, axes, folder, timing=timing, progress=_rows_only if args.quiet else say
        )
    diverged = any("diverged" in row for row in data["rows"])
    text = f"{table(data)}\nCSV, JSON and figures in {folder}"
    return Outcome(text, {"out": folder, **data}, FAILED if diverged else DONE)


def _settings(args: Any) -> Any:
    from dynaconv.study.curve_settings import curve_settings, width_of

    need_static_name(args.network)
    schedule = schedule_of(args)
    if args.network is not None and args.width is None:
        schedule["width"] = width_of(args.network)
    return curve_settings(args.data, hold=not args.no_hold, **schedule)


def _axes(args: Any) -> Any:
    from dynaconv.study.curve_settings import Axes

    _checks.cli_at_least("--seeds", args.seeds, 1)
    own = {"scenes": SHARE_SIZE if args.object_shares else SCENES_SIZE, "cifar10": CIFAR_SIZE}
    sizes = args.image_sizes or [own.get(args.data.partition(":")[0])]
    return Axes(args.methods, args.budgets, args.widths, args.seeds, sizes, args.object_shares or [None])


def _timing(args: Any) -> Any:
    from dynaconv.measure.rivals import choose_rivals
    from dynaconv.study.accuracy_macs import Timing

    for option, values in {"--rounds": [args.rounds], "--time-batch": args.time_batch}.items():
        for value in values:
            _checks.cli_at_least(option, value, 1)
    if args.threads is not None:
        _checks.cli_at_least("--threads", args.threads, 1)
    choose_rivals(args.engines)
    if args.no_times:
        return None
    return Timing(args.time_batch, args.rounds, args.seconds, args.engines, args.threads)


def _rows_only(line: str) -> None:
    if " left" in line or "milliseconds" in line:
        say(line)
