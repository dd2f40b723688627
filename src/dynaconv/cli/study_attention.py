"""`dynaconv study attention`: what the attention of a trained network does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import open_network
from dynaconv.cli.outcome import Outcome, number, say, share

HELP = "what attention does: distribution, entropy, accuracy when it is interfered with"
DESCRIPTION = """
Looks at the coefficients of every dynamic layer of a trained network on test pictures: their distribution,
their entropy, and how they differ between classes. Then measures accuracy with the mean kernel, the arg-max
kernel, coefficients fixed at their mean, coefficients of other pictures, and coefficients shuffled within each
picture; and, where the attention has a temperature, at a sweep of it. The network itself is not changed."""
EXAMPLES = """\
dynaconv study attention runs/dyconv
dynaconv study attention runs/dyconv --limit 1000 --temperatures 1 2 4 8
dynaconv study attention runs/compactness/runs/odconv-seed0 --out runs/attention-odconv --json"""
TEMPERATURES = [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0]


def add_arguments(parser: Any) -> None:
    """The run, the pictures, the temperatures."""
    parser.add_argument("run", help="run folder, or a folder that dc.save wrote")
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="scenes, imagefolder:DIR or cifar10:DIR; left out, what it was trained on",
    )
    parser.add_argument("--limit", type=int, default=None, help="number of test pictures; left out, all")
    parser.add_argument("--batch", type=int, default=64, help="pictures computed at once")
    parser.add_argument(
        "--temperatures", type=float, nargs="*", default=TEMPERATURES, help="temperatures to evaluate at"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the shuffles")
    parser.add_argument("--out", type=str, default=None, help="folder of the study; left out, RUN/attention")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def run(args: Any) -> Outcome:
    """Study, write, show.

    Raises:
        ValueError: bad input, a network without dynamic kernels, damaged files; FileNotFoundError: no such run.
    """
    from dynaconv.cost import machine_line
    from dynaconv.study.attention import attention
    from dynaconv.study.attention_write import write
    from dynaconv.study.folder import StudyFolder
    from dynaconv.study.layers import dynamic_layers

    _checks.cli_at_least("--batch", args.batch, 2)
    if args.limit is not None:
        _checks.cli_at_least("--limit", args.limit, 1)
    opened = open_network(args.run)
    if opened.folder is None:
        raise _checks.cli_needs_run(args.run, "study attention")
    dynamic_layers(opened.model)
    folder = StudyFolder(output_folder(args.out or Path(args.run) / "attention"), "attention")
    folder.check()
    bundle = run_dataset(opened, args.data)
    found = attention(
        opened.model,
        bundle.test,
        bundle.classes,
        batch_size=args.batch,
        limit=args.limit,
        temperatures=args.temperatures,
        seed=args.seed,
        progress=say,
    )
    facts = {"network": args.run, "data": bundle.name, "seed": args.seed, "machine": machine_line()}
    data = write(folder, found, facts)
    return Outcome(f"{_tables(found)}\nCSV, JSON and figure in {folder.path}", {"out": folder.path, **data})


def _tables(found: dict[str, Any]) -> str:
    layers = [
        (
            row["layer"],
            row["part"],
            row["kind"],
            str(row["coefficients"]),
            number(row["mean"]),
            number(row["std_over_images"]),
            number(row["entropy"]),
            number(row["largest_share"]),
            share(row["class_share"], 0),
        )
        for row in found["layers"]
    ]
    header = ("layer", "of", "kind", "count", "mean", "std", "entropy", "largest", "between classes")
    accuracy = [
        (row["intervention"], row["part"], share(row["accuracy"], 2), number(row["loss"]))
        for row in found["accuracy"]
    ]
    tables = [
        format_table(header, layers, "lllrrrrrr"),
        format_table(("coefficients", "part", "accuracy", "loss"), accuracy, "llrr"),
    ]
    if found["temperature"]:
        sweep = [
            (
                f"{row['temperature']:g}",
                share(row["accuracy"], 2),
                number(row["loss"]),
                number(row["entropy"]),
            )
            for row in found["temperature"]
        ]
        tables.append(format_table(("temperature", "accuracy", "loss", "entropy"), sweep, "rrrr"))
    return "\n\n".join(tables)
