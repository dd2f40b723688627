"""`dynaconv train`: a network from a recipe."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dynaconv.cli.folders import output_folder
from dynaconv.cli.outcome import INTERRUPTED, CommandFailed, Outcome, count, number, share

HELP = "train a network from a recipe, under a compute budget"
DESCRIPTION = """
Trains what a recipe says (a YAML file, or a shipped recipe by name) and leaves a run folder: config.yaml,
metrics.csv, TensorBoard events, checkpoints/ and the network in model/. Any key of the recipe can be
changed on the command line, as in --budget.target 0.5; `--masking none --budget none` makes it dense.
Ctrl-C keeps the last whole epoch; --resume continues the same run exactly. torchrun works
unchanged (write --run-dir there)."""
EXAMPLES = """\
dynaconv train scenes_dense --run runs/dense
dynaconv train scenes_dynconv --run runs/mine --trainer.init_from runs/dense --budget.target 0.5
dynaconv train scenes_dynconv --run runs/mine --trainer.init_from runs/dense --budget.target 0.5 --resume
dynaconv train my_recipe.yaml --data.name imagefolder:photos --print-config
torchrun --nproc-per-node 2 -m dynaconv train scenes_dense --run-dir runs/two"""
KEY_HELP = "change one key of the recipe; --SECTION.KEY VALUE is short for it, and the keys are listed below"


def add_arguments(parser: Any) -> None:
    """The recipe, the run folder, and the recipe's keys in the help."""
    parser.add_argument(
        "recipe", help="a YAML file, a run folder (its config.yaml), or the name of a shipped recipe"
    )
    parser.add_argument(
        # torchrun takes --run for an abbreviation of an option of its own.
        "--run",
        "--run-dir",
        type=str,
        default=None,
        metavar="DIR",
        help="folder of the run; left out, runs/NAME after the recipe; torchrun needs the longer spelling",
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run after its last completed epoch"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in that folder")
    parser.add_argument(
        "--print-config", action="store_true", help="print the recipe with all changes, train nothing"
    )
    parser.add_argument("--quiet", action="store_true", help="no progress bars")
    parser.add_argument(
        "--json", action="store_true", help="print history, accuracy and paths as JSON at the end"
    )
    parser.add_argument("--set", action="append", type=str, default=[], metavar="KEY=VALUE", help=KEY_HELP)
    parser.epilog = f"{parser.epilog}\n\nKeys of a recipe, with their defaults:\n{recipe_keys()}"


def recipe_keys() -> str:
    """Every key of a recipe with its explanation, from the recipe's own parser."""
    from dynaconv.train import recipe_parser

    text = recipe_parser(prog="dynaconv train").format_help()
    keys = text[text.index("The static network to start from") :]
    keys = re.sub(r"^  --\w+ CONFIG\s+Path to a configuration file\.\n", "", keys, flags=re.MULTILINE)
    return "\n".join(f"  {line}" for line in keys.splitlines())


def prepare(words: Sequence[str]) -> list[str]:
    """Turn `--budget.target 0.5` (and `--masking none`, `--calibrate 0.3 0.5`) into `--set budget.target=0.5`."""
    from dynaconv.train.loading import SECTIONS

    words, prepared = list(words), []
    while words:
        word = words.pop(0)
        key, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not ("." in key or key in SECTIONS or key == "calibrate"):
            prepared.append(word)
            continue
        values = [value] if equals else words[:1]
        words = words if equals else words[1:]
        while words and not equals and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", words[0]):
            values.append(words.pop(0))
        several = len(values) > 1 or (key == "calibrate" and not value.startswith("["))
        prepared.append(
            f"--set={key}={'[' + ','.join(values) + ']' if several and values else ''.join(values)}"
        )
    return prepared


def run(args: Any) -> Outcome:
    """Train and say where things are.

    Raises:
        ValueError, OSError: bad input; CommandFailed: interrupted, or the loss is no longer finite.
    """
    from dynaconv.train import TrainingDiverged, TrainingInterrupted, load_recipe, recipe_to_yaml

    recipe = load_recipe(args.recipe, [f"--{pair}" for pair in args.set])
    if args.print_config:
        return Outcome(recipe_to_yaml(recipe).rstrip(), recipe.to_dict())
    folder = output_folder(args.run or Path("runs") / run_name(args.recipe))
    from dynaconv.train import fit

    try:
        result = fit(recipe, folder, resume=args.resume, overwrite=args.overwrite, progress=not args.quiet)
    except TrainingInterrupted as stop:
        raise CommandFailed(f"{stop}; continue with: {again(args, folder)}", INTERRUPTED) from None
    except TrainingDiverged as error:
        raise CommandFailed(str(error)) from None
    data = {
        "run": folder,
        "model": folder / "model",
        "epochs": len(result.history),
        "seconds": result.seconds,
        "best_epoch": result.best_epoch,
        "best_accuracy": result.best_accuracy,
        "metric": result.metric,
        "calibration": result.calibration,
        "history": result.history,
    }
    # Under torchrun every process gets here, and one of them reports.
    return Outcome(data=None) if _follower() else Outcome(_text(data), data)


def run_name(recipe: str) -> str:
    """Name of the run folder for a recipe: its file's name without .yaml, or the run's own name."""
    path = Path(recipe)
    return path.stem if path.suffix in (".yaml", ".yml") else path.name


def again(args: Any, folder: Path) -> str:
    """The command that continues this run."""
    changes = [f"--{pair}" for pair in args.set]
    return shlex.join(["dynaconv", "train", args.recipe, "--run", str(folder), *changes, "--resume"])


def _follower() -> bool:
    return os.environ.get("RANK", "0") != "0"


def _text(data: dict[str, Any]) -> str:
    last = data["history"][data["best_epoch"] - 1] if data["history"] else {}
    lines = [
        f"trained {count(data['epochs'], 'epoch')} in {data['seconds']:.0f} s; kept epoch {data['best_epoch']}: "
        f"validation {data['metric']} {share(data['best_accuracy'])}, "
        f"conditional MACs executed {number(last.get('ratio'))}"
    ]
    for row in data["calibration"]:
        lines.append(f"calibrated to {row['target']:g}: {row['ratio']:.4f} on the calibration pictures")
    lines.append(f"run folder    {data['run']}")
    lines.append(f"network       {data['model']}")
    lines.append(f"next          dynaconv eval {data['run']}, then dynaconv report {data['run']}")
    return "\n".join(lines)
