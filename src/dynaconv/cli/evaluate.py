"""`dynaconv eval`: accuracy, executed MACs and milliseconds of a saved network on the test split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.networks import Opened, choose_targets, open_network, set_target
from dynaconv.cli.outcome import CommandFailed, Outcome, macs, number, say, share
from dynaconv.cli.times import TIMES_ARE, times

HELP = "accuracy, executed MACs and milliseconds on the test split"
DESCRIPTION = """
Evaluates a saved network at each of its calibrated budgets on the test split of the data set it was trained
on, times it with our engine, the eager executor and the dense engines that are installed, and writes
results.json and a gallery into the run for dynaconv report (with --limit or other data it only prints, and
times nothing). --calibrate first finds the thresholds that meet the budgets on the calibration split and
saves them in the run's network."""
EXAMPLES = """\
dynaconv eval runs/demo
dynaconv eval runs/mine --calibrate 0.3 0.5 0.7
dynaconv eval runs/mine --data imagefolder:photos --target 0.5 --limit 500 --json"""


# For each batch size.
SECONDS = 5.0


def add_arguments(parser: Any) -> None:
    """The run, the data, the budgets."""
    parser.add_argument("run", help="run folder, or a folder that dc.save wrote")
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="scenes, imagefolder:DIR or cifar10:DIR; left out, what it was trained on",
    )
    parser.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=None,
        help="budgets, shares of the conditional MACs; left out, all",
    )
    parser.add_argument(
        "--calibrate",
        type=float,
        nargs="+",
        default=None,
        help="budgets in (0, 1] to calibrate for, and save, first",
    )
    parser.add_argument("--limit", type=int, default=None, help="number of test pictures; left out, all")
    parser.add_argument("--batch", type=int, default=64, help="pictures evaluated at once")
    parser.add_argument(
        "--times",
        type=int,
        nargs="*",
        default=[1, 32],
        help="batch sizes to time, in pictures; --times alone times nothing",
    )
    parser.add_argument(
        "--strict", action="store_true", help="stop at an unreadable picture instead of skipping it"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Any) -> Outcome:
    """Calibrate if asked, evaluate, keep the results.

    Raises:
        ValueError: bad targets, other classes than the network's, damaged files.
        FileNotFoundError: no such run or data. CommandFailed: our engine and eager PyTorch disagree.
    """
    from dynaconv.measure import EnginesDisagree

    if args.limit is not None:
        _checks.cli_at_least("--limit", args.limit, 1)
    _checks.cli_at_least("--batch", args.batch, 1)
    for batch in args.times:
        _checks.cli_at_least("--times", batch, 1)
    for target in (*(args.calibrate or ()), *(args.target or ())):
        _checks.fraction("target", target)
    from dynaconv.data import task_of

    opened = open_network(args.run)
    if opened.folder is None:
        raise _checks.cli_needs_run(args.run, "eval")
    bundle = run_dataset(opened, args.data, args.strict)
    if args.calibrate:
        calibrate(opened, bundle, args.calibrate)
    targets = choose_targets(opened.model, args.target)
    own_data = args.data is None and args.limit is None
    try:
        measured, rows = (_whole if own_data else _part)(opened, bundle, targets, args)
    except EnginesDisagree as error:
        raise CommandFailed(str(error)) from None
    data = {
        "run": opened.folder,
        "data": bundle.name,
        "metric": task_of(bundle.test).metric,
        "rows": rows,
        "results": measured,
    }
    return Outcome(_text(rows, opened, bundle, measured), data)


def calibrate(opened: Opened, bundle: Any, targets: list[float]) -> None:
    """Find the thresholds on the calibration split and save the network with them."""
    import dynaconv as dc
    from dynaconv.data import make_loader

    loader = make_loader(bundle.calibration, 64, shuffle=False, seed=0, drop_last=False)
    report = dc.calibrate_(opened.model, loader, targets, progress=say)
    say(report.table())
    opened.metadata["calibration"] = report.rows
    dc.save(opened.model, opened.model_folder, arch=opened.arch, metadata=opened.metadata)


def _part(
    opened: Opened, bundle: Any, targets: list[float | None], args: Any
) -> tuple[Path | None, list[dict]]:
    """Accuracy and MACs of some pictures, or of another data set; nothing is written."""
    from torch.utils.data import Subset

    import dynaconv as dc
    from dynaconv.train import evaluate

    count = min(args.limit or len(bundle.test), len(bundle.test))
    images, _ = bundle.test.__getitems__([0])
    rows = []
    for target in targets:
        set_target(opened.model, target)
        result = evaluate(opened.model, Subset(bundle.test, range(count)), batch_size=args.batch)
        counted = dc.profile(opened.model, images)
        # One image gives what is always computed; the mean of the conditional part comes from all of them.
        always = counted.dense_macs - counted.conditional_macs + float(counted.routing_macs[0])
        executed = always + (result["ratio"] or 0.0) * counted.conditional_macs
        rows.append(_row(target, result, executed, counted.dense_macs, result["images"]))
    return None, rows


def _whole(
    opened: Opened, bundle: Any, targets: list[float | None], args: Any
) -> tuple[Path | None, list[dict]]:
    """The whole test split; the results go into the run, beside what is there already."""
    import dynaconv as dc
    from dynaconv.cli.results import keep_results
    from dynaconv.measure import measure_points

    command = f"dynaconv eval {opened.folder}"
    if not dc.gates(opened.model):
        measured = measure_points(
            opened.model,
            bundle,
            [],
            dense=opened.model,
            dense_name=opened.arch.get("name", "dense"),
            **_timing(args),
        )
        dense = measured["dense"]
        rows = [_row(None, {**dense, "ratio": None}, dense["macs"], dense["macs"], len(bundle.test))]
        return keep_results(opened, bundle, measured, command), rows
    if targets == [None]:
        return _part(opened, bundle, targets, args)
    measured = measure_points(
        opened.model, bundle, targets, batch_size=args.batch, progress=say, **_timing(args)
    )
    dense = measured["dense"]["macs"]
    rows = [_row(p["target"], p, p["executed_macs"], dense, len(bundle.test)) for p in measured["points"]]
    return keep_results(opened, bundle, measured, command), rows


def _timing(args: Any) -> dict[str, Any]:
    return {"latency": bool(args.times), "batch_sizes": tuple(args.times), "seconds": SECONDS}


def _row(
    target: float | None, result: dict[str, Any], executed: float, dense: int, images: int
) -> dict[str, Any]:
    return {
        "target": target,
        "accuracy": result["accuracy"],
        "ratio": result["ratio"],
        "executed_macs": executed,
        "dense_macs": dense,
        "macs_ratio": executed / dense,
        "images": images,
        "latency": result.get("latency", {}),
    }


def _text(rows: list[dict], opened: Opened, bundle: Any, results: Path | None) -> str:
    import dynaconv as dc
    from dynaconv.data import task_of

    as_is = "as trained" if dc.gates(opened.model) else "dense"
    batches = list(rows[0]["latency"])
    names = [f"ms at batch {batch}" for batch in batches]
    header = ("budget", task_of(bundle.test).metric, "conditional MACs", "executed MACs", "of dense", *names)
    cells = [
        (
            as_is if r["target"] is None else f"{r['target']:g}",
            share(r["accuracy"], 2),
            number(r["ratio"]),
            macs(r["executed_macs"]),
            number(r["macs_ratio"]),
            *times(r, batches),
        )
        for r in rows
    ]
    lines = [
        format_table(header, cells, "l" + "r" * (len(header) - 1)),
        f"{rows[0]['images']} test pictures of {bundle.name}",
    ]
    if batches:
        lines.append(TIMES_ARE)
    if results is not None:
        lines.append(f"results in {results}; dynaconv report {opened.folder} draws them")
    elif dc.gates(opened.model) and not dc.calibrated_targets(opened.model):
        lines.append("not calibrated: --calibrate 0.3 0.5 0.7 makes these budgets exact")
    return "\n".join(lines)
