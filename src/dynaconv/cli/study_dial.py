"""`dynaconv study dial`: one network at every budget, beside networks trained for each."""

from __future__ import annotations

from typing import Any

from dynaconv.cli.budget_options import add_options, settings_of
from dynaconv.cli.folders import output_folder
from dynaconv.cli.outcome import Outcome, say
from dynaconv.cli.resuming import resumable

HELP = "one network at every budget, beside networks trained for each"
DESCRIPTION = """
Trains a dense network, then dynamic ones from it: one for each budget, one for the whole range (every step aims
at another budget) and one for its middle, and draws accuracy against the executed share. The single networks are
calibrated at the ends of the range only, so the figure also shows how well set_budget_ interpolates. Every
finished network is kept: the same command goes on where it stopped."""
EXAMPLES = """\
dynaconv study dial
dynaconv study dial --budgets 0.2 0.35 0.5 0.65 0.8 --seeds 3
dynaconv study dial --data cifar10:DIR --network resnet8_cifar"""


def add_arguments(parser: Any) -> None:
    """The budgets, the data, the schedule."""
    parser.add_argument(
        "--budgets",
        type=float,
        nargs="+",
        default=[0.2, 0.4, 0.6, 0.8],
        help="shares of the conditional MACs, ascending; the first and last are the ends of the range",
    )
    add_options(parser, "runs/dial")


def run(args: Any) -> Outcome:
    """Train what is missing, compare, draw.

    Raises:
        ValueError: bad input; CommandFailed: interrupted.
    """
    from dynaconv.study.dial import dial, table

    settings, folder = settings_of(args), output_folder(args.out)
    with resumable():
        data = dial(settings, args.budgets, args.seeds, folder, progress=None if args.quiet else say)
    return Outcome(f"{table(data)}\nCSV, JSON and figure in {folder}", {"out": folder, **data})
