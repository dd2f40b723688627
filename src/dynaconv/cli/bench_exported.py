"""`dynaconv bench MODEL --engines ort openvino dynaconv`: the same network in stock runtimes and in our engine."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.networks import Opened, choose_targets, open_network, set_target
from dynaconv.cli.outcome import Outcome, macs, number, say, share

ENGINES = ("ort", "openvino", "dynaconv", "eager")
TITLES = {"ort": "ONNX Runtime", "openvino": "OpenVINO", "dynaconv": "dynaconv", "eager": "eager PyTorch"}
ACCURACY_IMAGES, SECONDS = 500, 6.0
Classify = Callable[[Any], np.ndarray]


def asked_for(model: str, engines: list[str] | None) -> bool:
    """These words mean exported networks: a file, or engines that only run those."""
    return model.endswith(".onnx") or bool(engines and {"ort", "dynaconv"} & set(engines))


def run(args: Any) -> Outcome:
    """Export at every budget, compare, time.

    Raises:
        ValueError: bad input, a file that is not ours. ImportError: a runtime that is not installed.
    """
    from dynaconv.export.runtimes import RUNTIMES, need_runtime

    engines = list(dict.fromkeys(args.engines or ["ort"]))
    for name in engines:
        _checks.one_of("engine", name, ENGINES)
        if name in RUNTIMES:
            need_runtime(name)
    if args.model.endswith(".onnx"):
        subjects, facts = _of_file(Path(args.model), engines)
    else:
        subjects, facts = _of_network(args, engines)
    data = _measure(subjects, facts, engines, args)
    return Outcome(_text(data), data)


class Subject:
    """A network at one budget: an ONNX file, its feeds, and the modules that the other engines run."""

    def __init__(
        self, label: str, file: Path, feed: dict[str, np.ndarray], model: Any = None, dense: Any = None
    ) -> None:
        self.label, self.file, self.feed, self.model, self.dense = label, file, feed, model, dense
        self.keep: Any = None

    def prepare(self, engine: str, x: Any, threads: int) -> Callable[[Any], dict[str, np.ndarray]]:
        """pictures [N, C, H, W] -> outputs by name."""
        import torch

        from dynaconv.export.runtimes import RUNTIMES, load

        if engine in RUNTIMES:
            session = load(engine, self.file, threads)
            return lambda images: session({"images": images.numpy(), **self.feed})
        import dynaconv as dc

        network = dc.compile(self.model, (x,)) if engine == "dynaconv" else self.model

        def call(images: Any) -> dict[str, np.ndarray]:
            with torch.inference_mode():
                return {"output": network(images).numpy()}

        return call


def _of_network(args: Any, engines: list[str]) -> tuple[list[Subject], dict[str, Any]]:
    """The network at each of its budgets, and the static one, exported to files that live as long as they are used."""
    import torch

    import dynaconv as dc
    from dynaconv.export.api import default_feed
    from dynaconv.measure import dense_twin

    opened = open_network(args.model)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    x, labels, source = _pictures(opened, size)
    folder = tempfile.TemporaryDirectory(prefix="dynaconv-")
    subjects = []

    def add(label: str, model: Any, lowering: str) -> None:
        say(f"exporting {label}")
        gated = bool(dc.gates(model))
        file = Path(folder.name) / f"{len(subjects)}.onnx"
        dial = "budget" if gated else None
        report = ("densities", "executed_macs") if gated else ()
        dc.export.onnx(model, (x[:8],), file, lowering=lowering, report=report, check=False)
        subjects.append(Subject(label, file, default_feed(model, dial), model))
        subjects[-1].keep = folder

    if dc.gates(opened.model):
        add("static", dense_twin(opened.model), "dense")
    for target in choose_targets(opened.model, args.target):
        model = copy.deepcopy(opened.model)
        set_target(model, target)
        add("as trained" if target is None else f"target {target:g}", model, "auto")
    threads = args.threads or torch.get_num_threads()
    facts = {"model": opened.name, "pictures": source, "threads": threads, "x": x, "labels": labels}
    return subjects, facts


def _of_file(path: Path, engines: list[str]) -> tuple[list[Subject], dict[str, Any]]:
    import torch

    from dynaconv.data import load_dataset
    from dynaconv.export.metadata import read_metadata

    facts = read_metadata(path)
    wrong = [name for name in engines if name in ("dynaconv", "eager")]
    if wrong:
        raise _checks.export_engine_of_file(wrong[0])
    if facts.get("dial") == "gates":
        feed = {"thresholds": np.array([_float(v) for v in facts["threshold"].values()], np.float32)}
    elif facts.get("dial") == "budget":
        feed = {"budget_threshold": np.array(_float(next(iter(facts["threshold"].values()))), np.float32)}
    else:
        feed = {}
    labels = None
    try:
        bundle = load_dataset(str(facts["dataset"]), image_size=facts.get("image_size"))
        count = min(ACCURACY_IMAGES, len(bundle.test))
        x, labels = bundle.test.__getitems__(list(range(count)))
        source = f"the first {count} of the test split of {bundle.name}"
    except (KeyError, ValueError, OSError, ImportError):
        x = torch.randn(32, *facts["input_size"], generator=torch.Generator().manual_seed(0))
        source = "noise"
    threads = torch.get_num_threads()
    return [Subject("as exported", path, feed)], {
        "model": str(path), "pictures": source, "threads": threads, "x": x, "labels": labels
    }  # fmt: skip


def _float(value: float | None) -> float:
    return float("-inf") if value is None else float(value)


def _pictures(opened: Opened, size: tuple[int, int, int]) -> tuple[Any, Any, str]:
    """Pictures with labels from the run's own data set where that is at hand, else noise without."""
    import torch

    from dynaconv.cli.datasets import run_dataset

    if opened.folder is not None and size == opened.input_size:
        try:
            bundle = run_dataset(opened)
        except (ValueError, OSError, ImportError) as error:
            say(f"noise instead of pictures: {error}")
        else:
            count = min(ACCURACY_IMAGES, len(bundle.test))
            x, labels = bundle.test.__getitems__(list(range(count)))
            return x, labels, f"the first {count} of the test split of {bundle.name}"
    return torch.randn(32, *size, generator=torch.Generator().manual_seed(0)), None, "noise"


def _measure(subjects: list[Subject], facts: dict[str, Any], engines: list[str], args: Any) -> dict[str, Any]:
    from dynaconv.cost import compare_latency, machine_line
    from dynaconv.measure.race import SETTLE_SECONDS, torch_threads

    x, labels, threads = facts.pop("x"), facts.pop("labels"), facts["threads"]
    batches = sorted({b for b in args.batch or [1] if b <= len(x)})
    rows, calls = [], {}
    with torch_threads(threads):
        for subject in subjects:
            for engine in engines:
                say(f"{TITLES[engine]}: {subject.label}")
                call = subject.prepare(engine, x[:1], threads)
                rows.append({"network": subject.label, "engine": engine, **_answers(call, x, labels)})
                for batch in batches:
                    calls[subject.label, engine, batch] = (call, x[:batch].contiguous())
        _fill_macs(rows)
        times = compare_latency(
            {
                str(key): (lambda call=call, images=images: call(images))
                for key, (call, images) in calls.items()
            },
            rounds=args.rounds or 25,
            seconds=None if args.rounds else SECONDS,
            settle_seconds=SETTLE_SECONDS,
        )
    for row in rows:
        row["latency"] = {
            str(batch): {
                k: times[str((row["network"], row["engine"], batch))][k] for k in ("min_ms", "median_ms")
            }
            for batch in batches
        }
    return {**facts, "machine": machine_line(), "rows": rows}


def _answers(call: Callable[[Any], dict[str, np.ndarray]], x: Any, labels: Any) -> dict[str, Any]:
    """Accuracy, executed multiply-adds and densities on all pictures."""
    parts = [call(x[s : s + 32].contiguous()) for s in range(0, len(x), 32)]
    joined = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    right = None if labels is None else float((joined["output"].argmax(1) == np.asarray(labels)).mean())
    executed = float(joined["executed_macs"].mean()) if "executed_macs" in joined else None
    density = float(joined["densities"].mean()) if "densities" in joined else None
    return {"accuracy": right, "executed_macs": executed, "density": density}


def _fill_macs(rows: list[dict[str, Any]]) -> None:
    """What masks ask for does not depend on the engine: engines that do not count take the number of one that does."""
    known = {row["network"]: row for row in rows if row["executed_macs"] is not None}
    for row in rows:
        if row["executed_macs"] is None and row["network"] in known:
            row |= {key: known[row["network"]][key] for key in ("executed_macs", "density")}


def _text(data: dict[str, Any]) -> str:
    batches = list(data["rows"][0]["latency"])
    names = [f"{kind} ms at {batch}" for batch in batches for kind in ("min", "median")]
    header = ("network", "engine", "accuracy", "executed MACs", "density", *names)
    rows = [
        (
            row["network"],
            TITLES[row["engine"]],
            share(row["accuracy"], 2),
            macs(row["executed_macs"]),
            number(row["density"]),
            *(number(row["latency"][b][k], ".2f") for b in batches for k in ("min_ms", "median_ms")),
        )
        for row in data["rows"]
    ]
    lines = [
        f"{data['model']}; pictures: {data['pictures']}",
        f"{data['machine']}; {data['threads']} threads for every engine, float32, interleaved",
        "",
        format_table(header, rows, "ll" + "r" * (len(header) - 2)),
    ]
    return "\n".join(lines)
