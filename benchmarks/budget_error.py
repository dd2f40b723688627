"""How well calibration meets budgets, for the gates of any runs: on the pictures it saw, and on held-out ones.

    .venv/bin/python benchmarks/budget_error.py runs/demo
    .venv/bin/python benchmarks/budget_error.py RUN RUN ... --targets 0.2 0.5 0.9 --limit 2000 --check

Each network is calibrated in memory (the run is left as it is) and turned to every target; held-out pictures are those
of the test split. A number is the executed share of the conditional multiply-adds minus the target.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tables import markdown
from torch.utils.data import Subset

import dynaconv as dc
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.networks import open_network
from dynaconv.cost import machine_line
from dynaconv.data import make_loader
from dynaconv.train import evaluate

TARGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# What the project promises, on the calibration pictures and on held-out ones.
LIMITS = {"calibration": 0.01, "held-out": 0.02}


def main() -> int:
    """Calibrate, turn, compare, show."""
    args = parse()
    print(machine_line())
    rows = [row for run in args.runs for row in errors(run, args)]
    print(
        markdown(["run", "gates", "pictures", "worst", *(f"{t:g}" for t in args.targets)], map(cells, rows))
    )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    missed = [row for row in rows if row["worst"] > LIMITS[row["pictures"]]]
    for row in missed if args.check else ():
        print(f"missed: {row['run']}, {row['pictures']}: {row['worst']:.4f}")
    return int(bool(args.check and missed))


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("runs", nargs="+", help="run folders of networks with gates")
    add("--targets", type=float, nargs="+", default=TARGETS, help="shares of the conditional MACs, ascending")
    add("--limit", type=int, help="test pictures; left out, all")
    add("--check", action="store_true", help="exit code 1 where an error is larger than promised")
    add("--json", type=Path, help="also write the numbers to this file")
    return parser.parse_args()


def errors(run: str, args: argparse.Namespace) -> list[dict]:
    """Two rows: errors on the calibration pictures, and on the test pictures."""
    opened = open_network(run)
    bundle = run_dataset(opened)
    loader = make_loader(bundle.calibration, 64, shuffle=False, seed=0, drop_last=False)
    report = dc.calibrate_(opened.model, loader, args.targets)
    test = Subset(bundle.test, range(min(args.limit or len(bundle.test), len(bundle.test))))
    held_out = []
    for target in args.targets:
        dc.set_budget_(opened.model, target)
        # A loader of its own, because a subset does not say what task it is of.
        ratio = evaluate(opened.model, make_loader(test, 64, shuffle=False, seed=0, drop_last=False))["ratio"]
        held_out.append(ratio - target)
        print(f"{run}: {target:g} -> {ratio:.4f}", file=sys.stderr)
    kinds = sorted({type(gate).__name__ for gate in dc.gates(opened.model).values()})
    found = {"calibration": [row["error"] for row in report.rows], "held-out": held_out}
    return [
        {"run": Path(run).name, "gates": ", ".join(kinds), "pictures": pictures, "errors": list(values),
         "worst": max(map(abs, values))}
        for pictures, values in found.items()
    ]  # fmt: skip


def cells(row: dict) -> list[str]:
    """One line of the table."""
    head = [row["run"], row["gates"], row["pictures"], f"{row['worst']:.4f}"]
    return [*head, *(f"{value:+.4f}" for value in row["errors"])]


if __name__ == "__main__":
    sys.exit(main())
