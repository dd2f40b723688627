"""`dynaconv study fixes`: what each fix of DynConv's training is worth."""

from __future__ import annotations

from typing import Any

from dynaconv.cli.budget_options import add_options, settings_of
from dynaconv.cli.folders import output_folder
from dynaconv.cli.outcome import Outcome, say
from dynaconv.cli.resuming import resumable
from dynaconv.study.fixes import VARIANTS

HELP = "what each fix of DynConv's training is worth, at equal executed MACs"
DESCRIPTION = """
Trains a dense network, then dynamic ones from it: the paper's preset, the default, the default without each fix
and with each option, the paper's with each fix. All are calibrated to the same executed share before they are
compared; the share that training alone reached is shown, too. Every finished network is kept: the same command
goes on where it stopped."""
EXAMPLES = """\
dynaconv study fixes
dynaconv study fixes --variants paper default default-dilation --seeds 3
dynaconv study fixes --data cifar10:DIR --network resnet8_cifar --target 0.5"""


def add_arguments(parser: Any) -> None:
    """The variants, the data, the schedule."""
    parser.add_argument(
        "--variants", type=str, nargs="+", default=list(VARIANTS), help="out of: " + ", ".join(VARIANTS)
    )
    parser.add_argument("--target", type=float, default=None, help="share of the conditional MACs")
    add_options(parser, "runs/fixes")


def run(args: Any) -> Outcome:
    """Train what is missing, compare, show.

    Raises:
        ValueError: bad input; CommandFailed: interrupted.
    """
    from dynaconv.study.fixes import fixes, table

    settings, folder = settings_of(args, target=args.target), output_folder(args.out)
    with resumable():
        data = fixes(settings, args.variants, args.seeds, folder, progress=None if args.quiet else say)
    return Outcome(f"{table(data)}\nCSV and JSON in {folder}", {"out": folder, **data})
