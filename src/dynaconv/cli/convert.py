"""`dynaconv convert`: make a network dynamic and show what became of every module."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dynaconv import _checks
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import check_input_size, open_network
from dynaconv.cli.outcome import Outcome

HELP = "make a network dynamic and show what became of every module"
DESCRIPTION = """
Builds a network by name (or loads a saved one), gives every residual block that a handler knows a mask
unit (or, with --kernels, the layers of a paper dynamic kernels; with --kernels and --masks both), and prints
what is dynamic now, what stays static and why, with parameters and MACs before and after. With --out the
dynamic network is saved there (config.json + model.safetensors) for dc.load, profile and bench. A network
with dynamic kernels computes what it did before; both have to be trained: see dynaconv train."""
EXAMPLES = """\
dynaconv convert timm:resnet50
dynaconv convert resnet14_cifar --preset paper --out runs/start
dynaconv convert torchvision:resnet18 --kernels dyconv --input-size 3 224 224
dynaconv convert timm:resnet18 --rules '{"layer4": {"kind": "dcd"}}'
dynaconv convert timm:resnet18 --rules '{"layer1": null, "re:layer[234]": {"granularity": 2}}' --all"""


def add_arguments(parser: Any) -> None:
    """The network, how to mask it, where to save it."""
    parser.add_argument(
        "model", help="a name of `dynaconv models`, timm:NAME, torchvision:NAME, or a saved network"
    )
    parser.add_argument(
        "--preset", default="default", help="paper: as DynConv was published; default: our recommendation"
    )
    parser.add_argument("--unit", default="squeeze", help="kind of mask unit: squeeze or conv1x1 (cheaper)")
    parser.add_argument(
        "--granularity", type=int, default=1, help="side in pixels of the squares that are decided together"
    )
    parser.add_argument(
        "--kernels",
        default=None,
        help="dynamic kernels instead of masks: condconv, dyconv, dynet, dcd, odconv or weightnet",
    )
    parser.add_argument("--masks", action="store_true", help="with --kernels: masks as well")
    parser.add_argument(
        "--rules",
        type=str,
        default=None,
        help="JSON, or a JSON file: module name or re:PATTERN to a config such as "
        '{"preset": "paper", "unit": "conv1x1", "granularity": 2} or {"kind": "odconv", "num_kernels": 4}, or null '
        "for static; names beat patterns",
    )
    parser.add_argument(
        "--num-classes", type=int, default=None, help="outputs of the network; left out, its own number"
    )
    parser.add_argument(
        "--pretrained", action="store_true", help="download weights (timm and torchvision only)"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        default=None,
        metavar=("C", "H", "W"),
        help="picture for the MACs, in pixels",
    )
    parser.add_argument("--out", type=str, default=None, help="folder to save the dynamic network in")
    parser.add_argument(
        "--all", action="store_true", help="list every module, also those inside and outside the blocks"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report as JSON")


def run(args: Any) -> Outcome:
    """Convert, save, show.

    Raises:
        ValueError: unknown names, nothing to convert, rules that match nothing, an output path that is in the way.
    """
    import dynaconv as dc

    out = None if args.out is None else output_folder(args.out)
    config = dc.SpatialMasking(preset=args.preset, unit=args.unit, granularity=args.granularity)
    if args.kernels is not None:
        kernels = _kernels(args.kernels)
        config = (config, kernels) if args.masks else kernels
    rules = None if args.rules is None else read_rules(args.rules)
    opened = open_network(args.model, args.num_classes, args.pretrained)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    check_input_size(size, opened.model)
    report = dc.dynamize_(opened.model, rules or config, input_size=size)
    lines = [report.table(every=args.all)]
    if out is not None:
        dc.save(opened.model, out, metadata=opened.metadata)
        lines.append(f"saved in {out}")
    return Outcome("\n".join(lines), {"model": opened.name, **report.to_dict(), "saved": out})


def _kernels(method: str) -> Any:
    from dynaconv.convert import config_from_dict
    from dynaconv.convert.scopes import METHODS

    _checks.one_of("--kernels method", method, METHODS)
    return config_from_dict({"kind": method})


def read_rules(text: str) -> dict[str, Any]:
    """Rules for `dc.dynamize_` from JSON text or a JSON file.

    Raises:
        ValueError: not JSON, not a mapping, or a config with an unknown option.
    """
    from dynaconv.convert import config_from_dict

    content = text
    try:
        if not text.lstrip().startswith("{"):
            content = Path(text).read_text(encoding="utf-8")
        rules = json.loads(content)
    except FileNotFoundError:
        raise _checks.cli_rules_not_json(text, "there is no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _checks.cli_rules_not_json(text, str(error)) from None
    if not isinstance(rules, dict) or not all(v is None or isinstance(v, dict) for v in rules.values()):
        raise _checks.cli_rules_not_json(text, "expected an object whose values are objects or null")
    return {name: None if value is None else config_from_dict(value) for name, value in rules.items()}
