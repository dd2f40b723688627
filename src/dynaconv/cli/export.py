"""`dynaconv export RUN`: a network as an ONNX file that still skips, or as a torch.export program."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv._files import atomic_write_text
from dynaconv.cli.networks import Opened, check_input_size, choose_targets, open_network, set_target
from dynaconv.cli.outcome import CommandFailed, Outcome
from dynaconv.cli.profile import pictures

HELP = "write a network as ONNX that still skips, or as a torch.export program"
DESCRIPTION = """
Writes a network as a file that runs without Python's code: ONNX of standard operators, in which masked blocks
compute only open positions (--lowering sparse), everything times the mask (dense), or whichever is faster at the
densities that the network has on its own pictures (auto); or a torch.export program. The file holds class names,
preprocessing and the table of budgets; the same lies beside it as JSON. The budget stays a dial: the input
`budget_threshold`. ONNX is compared with eager PyTorch before it is written where ONNX Runtime is installed;
--check insists on that, and compares a program, too (exit code 1 when they differ)."""
EXAMPLES = """\
dynaconv export runs/demo
dynaconv export runs/demo --lowering sparse --target 0.5 --out demo.onnx --check
dynaconv export runs/demo --format pt2 --check
dynaconv export timm:resnet50 --lowering dense --input-size 3 224 224"""
FORMATS = ("onnx", "pt2")
PICTURES = 8


def add_arguments(parser: Any) -> None:
    """The network, the form it gets, where it goes."""
    parser.add_argument("model", help="a run folder, a saved network, or a name of `dynaconv models`")
    parser.add_argument(
        "--format", choices=FORMATS, default="onnx", help="onnx, or pt2: a torch.export program"
    )
    parser.add_argument(
        "--out", type=str, default=None, help="file; left out, RUN/model.onnx or RUN/model.pt2"
    )
    parser.add_argument(
        "--lowering",
        choices=("auto", "sparse", "dense"),
        default="auto",
        help="onnx: how masked blocks compute",
    )
    parser.add_argument(
        "--target", type=float, default=None, help="calibrated budget that is set, and that auto chooses by"
    )
    parser.add_argument(
        "--opset", type=int, default=18, help="onnx: version of the operator set, 18 or newer"
    )
    parser.add_argument("--dynamic-size", action="store_true", help="serve any height and width")
    parser.add_argument(
        "--batch",
        type=int,
        default=1,
        help="onnx: pictures that the file shall be fastest for; it serves any number",
    )
    parser.add_argument("--fixed-batch", type=int, default=None, help="serve this number of pictures only")
    parser.add_argument(
        "--dial", choices=("budget", "gates", "none"), default="budget",
        help="onnx: thresholds as inputs: one for all gates, one for each, or none",
    )  # fmt: skip
    parser.add_argument(
        "--report", choices=("densities", "executed_macs", "both", "none"), default="densities",
        help="onnx: outputs beside the network's own",
    )  # fmt: skip
    parser.add_argument(
        "--input-size", type=int, nargs=3, default=None, metavar=("C", "H", "W"), help="picture in pixels"
    )
    parser.add_argument("--check", action="store_true", help="compare the file with eager PyTorch, or fail")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")


def run(args: Any) -> Outcome:
    """Export, check, show.

    Raises:
        ValueError: an unknown network, a budget that it is not calibrated for, what cannot be exported.
        ImportError: a package is missing. CommandFailed: the file and eager PyTorch differ.
    """
    import dynaconv as dc

    _checks.cli_at_least("--batch", args.batch, 1)
    if args.fixed_batch is not None:
        _checks.cli_at_least("--fixed-batch", args.fixed_batch, 1)
    opened = open_network(args.model)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    check_input_size(size, opened.model)
    targets = choose_targets(opened.model, None if args.target is None else [args.target])
    set_target(opened.model, targets[0])
    count = args.fixed_batch or (PICTURES if dc.gates(opened.model) else 1)
    x, source = pictures(opened, size, count)
    out = Path(args.out) if args.out else _place(opened, args.format)
    try:
        write = _program if args.format == "pt2" else _onnx
        data = write(opened, x, out, args)
    except RuntimeError as error:
        raise CommandFailed(str(error)) from None
    text = data.pop("text")
    data |= {"model": opened.name, "target": targets[0], "pictures": source}
    return Outcome(f"{text}\nfacts in {data['facts']}", data)


def _place(opened: Opened, kind: str) -> Path:
    name = opened.name.replace(":", "-")
    return Path(f"{name}.{kind}") if opened.folder is None else opened.folder / f"model.{kind}"


def _facts(opened: Opened) -> dict[str, Any]:
    """What a deployment has to know: classes, preprocessing, where the weights come from."""
    kept = ("classes", "mean", "std", "image_size", "dataset")
    return {"arch": opened.arch, **{key: opened.metadata[key] for key in kept if key in opened.metadata}}


def _beside(out: Path, facts: Mapping[str, Any]) -> Path:
    """The same facts as JSON, for programs that cannot look into the file."""
    from dynaconv.export.metadata import to_json

    place = out.with_suffix(".json")
    atomic_write_text(place, to_json(facts) + "\n")
    return place


def _onnx(opened: Opened, x: Any, out: Path, args: Any) -> dict[str, Any]:
    import dynaconv as dc
    from dynaconv.export.runtimes import need_runtime

    if args.check:
        need_runtime("ort")
    reports = {"none": (), "both": ("densities", "executed_macs")}.get(args.report, (args.report,))
    done = dc.export.onnx(
        opened.model,
        (x,),
        out,
        lowering=args.lowering,
        dynamic_batch=args.fixed_batch is None,
        dynamic_size=args.dynamic_size,
        batch=args.batch,
        opset=args.opset,
        dial=None if args.dial == "none" else args.dial,
        report=reports if dc.gates(opened.model) or args.report != "densities" else (),
        metadata=_facts(opened),
        check=True if args.check else None,
    )
    facts = _beside(out, dc.export.read_metadata(out))
    shown = ("opset", "lowering", "blocks", "densities", "inputs", "outputs", "error", "flips")
    return {"text": done.table(), "file": out, "facts": facts, **{k: getattr(done, k) for k in shown}}


def _program(opened: Opened, x: Any, out: Path, args: Any) -> dict[str, Any]:
    import dynaconv as dc
    from dynaconv.export.metadata import KEY, describe, to_json
    from dynaconv.export.parity import check_program

    exported = dc.export.program(
        opened.model, (x,), dynamic_batch=args.fixed_batch is None, dynamic_size=args.dynamic_size
    )
    error = check_program(exported, opened.model, x) if args.check else None
    facts = describe(opened.model, (x,), _facts(opened))
    dc.export.save_program(exported, out, {f"{KEY}.json": to_json(facts)})
    text = f"{out} ({out.stat().st_size / 1e6:.1f} MB), torch.export.load opens it"
    if error is not None:
        text += f"\noff by {error:.1e} of the largest magnitude from eager PyTorch"
    return {"text": text, "file": out, "facts": _beside(out, facts), "error": error}
