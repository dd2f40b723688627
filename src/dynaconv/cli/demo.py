"""`dynaconv demo`: the main job from nothing to a report, on the embedded data set."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dynaconv._table import format_table
from dynaconv.cli.bench_networks import verify
from dynaconv.cli.folders import own_or_new_folder
from dynaconv.cli.outcome import INTERRUPTED, CommandFailed, Outcome, count, macs, number, say, share
from dynaconv.cli.times import TIMES_ARE, every_engine, times

HELP = "train, calibrate, time and report on the embedded data set"
DESCRIPTION = """
The whole story in some minutes on two cores: trains a dense network and a dynamic one on scenes
(handwritten digits somewhere on cluttered pictures), calibrates the dynamic one to budgets of 30, 50 and 70
% of its conditional multiply-adds, measures accuracy, MACs and milliseconds on the test split, and writes
report.html. An earlier demo in the same folder is replaced; other folders are never touched."""
EXAMPLES = """\
dynaconv demo
dynaconv demo --out runs/mine --json > results.json
dynaconv demo --quick --out runs/toy"""
# A toy that shows that everything works, not that it works well.
QUICK = {
    "model.options.width": 8,
    "data.image_size": 32,
    "data.train_size": 64,
    "data.batch_size": 32,
    "trainer.epochs": 1,
    "trainer.precision": "fp32",
}
# Of timing, for each batch size.
SECONDS = 12.0
QUICK_SPLITS = {"calibration_size": 256, "test_size": 256}


def add_arguments(parser: Any) -> None:
    """Where to, and how thorough."""
    parser.add_argument(
        "--out", type=str, default="runs/demo", help="run folder; its subfolder dense/ is the baseline's"
    )
    parser.add_argument(
        "--quick", action="store_true", help="a toy in seconds: tiny pictures, one epoch, no accuracy"
    )
    parser.add_argument(
        "--json", action="store_true", help="print results.json instead of a table at the end"
    )


@dataclass
class Demo:
    """What the stages share."""

    out: Path
    quick: bool
    started: float = field(default_factory=time.monotonic)
    stages: int = 0

    def stage(self, title: str) -> None:
        """Heading of the next stage."""
        self.stages += 1
        minutes, seconds = divmod(int(time.monotonic() - self.started), 60)
        say(f"\n[{minutes}:{seconds:02d}] {self.stages}. {title}")


def run(args: Any) -> Outcome:
    """All stages.

    Raises:
        ValueError: the folder holds something else; CommandFailed: interrupted, diverged, or the networks disagree.
    """
    from dynaconv.train import TrainingDiverged, TrainingInterrupted

    demo = Demo(own_or_new_folder(args.out, parts=("dense",)), args.quick)
    for stale in ("results.json", "report.html"):
        (demo.out / stale).unlink(missing_ok=True)
    try:
        return _stages(demo)
    except (TrainingInterrupted, KeyboardInterrupt):
        raise CommandFailed(
            "interrupted; dynaconv demo starts again from the beginning", INTERRUPTED
        ) from None
    except TrainingDiverged as error:
        raise CommandFailed(str(error)) from None


def _stages(demo: Demo) -> Outcome:
    recipes = {name: _recipe(f"scenes_{name}", demo) for name in ("dense", "dynconv")}
    bundle = _data(demo, recipes["dense"])
    dense = _train_dense(demo, recipes["dense"], bundle)
    dynamic = _train_dynamic(demo, recipes["dynconv"], bundle)
    measured = _measure(demo, recipes, bundle, dense, dynamic)
    page = _report(demo, bundle, measured, dense, dynamic)
    return _outcome(demo, page)


def _recipe(name: str, demo: Demo) -> Any:
    from dynaconv.train import load_recipe

    return load_recipe(name, QUICK if demo.quick else {})


def _data(demo: Demo, recipe: Any) -> Any:
    from dynaconv.data import load_dataset
    from dynaconv.data.scenes import load_scenes

    demo.stage("Draw the scenes")
    section = recipe.data
    options = {key: getattr(section, key) for key in ("image_size", "train_size", "seed", "augment")}
    bundle = load_scenes(**options, **QUICK_SPLITS) if demo.quick else load_dataset(section.name, **options)
    sizes = (len(bundle.train), len(bundle.calibration), len(bundle.test))
    say("{} to train on, {} to validate and calibrate, {} to test".format(*sizes))
    return bundle


def _train_dense(demo: Demo, recipe: Any, bundle: Any) -> Any:
    from dynaconv.train import fit

    demo.stage(f"Train the dense baseline, {count(recipe.trainer.epochs, 'epoch')}")
    return fit(recipe, demo.out / "dense", overwrite=True, bundle=bundle)


def _train_dynamic(demo: Demo, recipe: Any, bundle: Any) -> Any:
    from dynaconv.train import fit

    budget = recipe.budget.target
    demo.stage(
        f"Train the dynamic network under a budget of {budget:g}, {count(recipe.trainer.epochs, 'epoch')}; calibrate it"
    )
    result = fit(lean_on(recipe, demo.out / "dense"), demo.out, overwrite=True, bundle=bundle)
    for row in result.calibration:
        say(
            f"calibrated to {row['target']:g}: {row['ratio']:.4f} of the conditional MACs on the calibration pictures"
        )
    return result


def lean_on(recipe: Any, dense: Path) -> Any:
    """The recipe with this demo's dense run wherever it starts from a dense network or learns from one."""
    from dynaconv.train import load_recipe

    changes = {}
    if recipe.trainer.init_from is not None:
        changes["trainer.init_from"] = str(dense)
    if recipe.trainer.distill_weight > 0:
        changes["trainer.teacher"] = str(dense)
    return load_recipe(recipe, changes)


def _measure(demo: Demo, recipes: dict[str, Any], bundle: Any, dense: Any, dynamic: Any) -> dict[str, Any]:
    from dynaconv.budget import set_budget_
    from dynaconv.measure import EnginesDisagree, measure_points

    demo.stage("Measure accuracy, MACs and milliseconds on the test split")
    targets = [row["target"] for row in dynamic.calibration]
    images, _ = bundle.test.__getitems__(list(range(min(8, len(bundle.test)))))
    for target in targets:
        set_budget_(dynamic.model, target)
        verify(dynamic.model, images, f"target {target:g}")
    try:
        measured = measure_points(
            dynamic.model,
            bundle,
            targets,
            dense=dense.model,
            dense_name=recipes["dense"].model.name,
            rounds=2 if demo.quick else 25,
            seconds=SECONDS,
            batch_sizes=(1, 8) if demo.quick else (1, 32),
            # Exporting the network for the others takes longer than the whole toy.
            rivals=["eager"] if demo.quick else None,
            progress=say,
        )
    except EnginesDisagree as error:
        raise CommandFailed(str(error)) from None
    measured["dense"]["train_seconds"] = dense.seconds
    for point, row in zip(measured["points"], dynamic.calibration, strict=True):
        point["calibration_ratio"] = row["ratio"]
    return measured


def _report(demo: Demo, bundle: Any, measured: dict[str, Any], dense: Any, dynamic: Any) -> Path:
    from dynaconv.measure import build_gallery, write_results
    from dynaconv.report import write_report

    demo.stage("Write the report")
    targets = [point["target"] for point in measured["points"]]
    history = [
        {"run": run, **entry}
        for run, fit in (("dense", dense), ("dynamic", dynamic))
        for entry in fit.history
    ]
    write_results(
        demo.out,
        title="dynaconv demo (quick: nothing is trained well)" if demo.quick else "dynaconv demo",
        command="dynaconv demo" + (" --quick" if demo.quick else ""),
        bundle=bundle,
        measured=measured,
        history=history,
        notes=_notes(demo, dense, dynamic),
        gallery=build_gallery(
            dynamic.model, bundle, targets, count=6 if demo.quick else 36, dense=dense.model
        ),
    )
    return write_report(demo.out)


def _notes(demo: Demo, dense: Any, dynamic: Any) -> list[str]:
    return [
        f"Training took {dense.seconds:.0f} s for the dense and {dynamic.seconds:.0f} s for the dynamic network.",
        f"The whole demo took {time.monotonic() - demo.started:.0f} s and at most {peak_memory_gb():.2f} GB of memory.",
        "Before timing, skipping was checked against the masked dense computation, block by block, and our engine "
        "against eager PyTorch.",
    ]


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e9 if sys.platform == "darwin" else peak * 1024 / 1e9


def _outcome(demo: Demo, page: Path) -> Outcome:
    from dynaconv.measure import read_results

    results = read_results(demo.out)
    seconds, peak = time.monotonic() - demo.started, peak_memory_gb()
    lines = [
        table(results),
        TIMES_ARE,
        "",
        every_engine(results),
        "",
        f"{seconds / 60:.1f} minutes, peak memory {peak:.2f} GB",
        f"Report: {page}",
        f"Try it: dynaconv explain {demo.out} PICTURE",
    ]
    data = {**results, "report": page, "seconds": seconds, "peak_memory_gb": peak}
    return Outcome("\n".join(lines), data)


def table(results: dict[str, Any]) -> str:
    """The dense network and every budget: accuracy, MACs, milliseconds with their ratio, focus on the object."""
    dense, points = results["dense"], results["points"]
    batches = list(dense.get("latency", {}))
    rows = [
        (
            "dense",
            share(dense["accuracy"], 2),
            "-",
            macs(dense["macs"]),
            "1.000",
            *times(dense, batches),
            "-",
        )
    ]
    for p in points:
        focus = None if not p["density_outside"] else p["density_inside"] / p["density_outside"]
        cost = (number(p["ratio"]), macs(p["executed_macs"]), number(p["macs_ratio"]))
        rows.append(
            (f"{p['target']:g}", share(p["accuracy"], 2), *cost, *times(p, batches), number(focus, ".2f"))
        )
    names = [f"ms at batch {batch}" for batch in batches]
    header = ("budget", "accuracy", "conditional", "executed MACs", "of dense", *names, "in/out of box")
    return format_table(header, rows, "l" + "r" * (len(header) - 1))
