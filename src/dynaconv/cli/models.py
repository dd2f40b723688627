"""`dynaconv models`: names that other verbs accept."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.outcome import Outcome

HELP = "list networks by name, with parameters and MACs"
DESCRIPTION = """
Lists the networks that profile, bench, convert and recipes know by name, with their parameters and the
multiply-adds (MACs) of one image when everything is computed. Names that start with dynconv_ have a mask
unit at every residual block. timm's and torchvision's networks are reached by a prefix; a pattern with that
prefix lists their names."""
EXAMPLES = """\
dynaconv models
dynaconv models 'dynconv_*'
dynaconv models 'dcd_*'
dynaconv models 'timm:resnet*' --json"""

MOST_SIZED = 20
_NOTE = (
    "MACs are multiply-adds of the convolutions for one image, gates not included; with dynamic kernels linear layers "
    "count, routing and mixing do not."
)


def add_arguments(parser: Any) -> None:
    """Pattern and --json."""
    parser.add_argument(
        "pattern", nargs="?", default="*", help="shell pattern of names, in quotes; * is all of ours"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")


def run(args: Any) -> Outcome:
    """List what matches.

    Raises:
        ValueError: nothing matches.
    """
    from dynaconv import list_models
    from dynaconv.models.dynamic import parse_name

    names = list_models(args.pattern)
    if not names:
        raise _checks.unknown("model", args.pattern, list_models())
    if ":" in args.pattern:
        return Outcome("\n".join(names), [{"name": name} for name in names])
    dynamic = {name for name in names if parse_name(name)}
    sized = len(dynamic) <= MOST_SIZED
    rows = [
        (_kernel_row if name in dynamic else _row)(name) for name in names if sized or name not in dynamic
    ]
    cells = [
        (r["name"], f"{r['params']:,}", f"{r['dense_macs']:,}", "x".join(map(str, r["input_size"])))
        for r in rows
    ]
    if not sized:
        rows += [{"name": name} for name in names if name in dynamic]
        cells += [(name, "", "", "") for name in names if name in dynamic]
    table = format_table(("name", "parameters", "dense MACs", "input"), cells, "lrrl")
    return Outcome(f"{table}\n{_NOTE}", rows)


def _row(name: str) -> dict[str, Any]:
    from dynaconv import create_model

    static = name.removeprefix("dynconv_")
    model = create_model(static)
    params = sum(p.numel() for p in model.parameters())
    if static != name:
        params += _gate_params(model)
    return {
        "name": name,
        "params": params,
        "dense_macs": _conv_macs(model, model.input_size),
        "input_size": list(model.input_size),
    }


def _kernel_row(name: str) -> dict[str, Any]:
    """Sizes of a network with dynamic kernels, built without drawing its weights."""
    import torch

    from dynaconv import create_model, profile

    with torch.device("meta"):
        model = create_model(name)
    counted = profile(model.to_empty(device="cpu"), torch.zeros(1, *model.input_size))
    return {
        "name": name,
        "params": counted.params,
        "dense_macs": counted.dense_macs,
        "input_size": list(model.input_size),
    }


def _gate_params(model: nn.Module) -> int:
    """Parameters that the default mask units would add."""
    from dynaconv import SpatialMasking
    from dynaconv.convert import find_blocks
    from dynaconv.nn import Anatomy

    count = 0
    for name, anatomy in find_blocks(model).items():
        if isinstance(anatomy, Anatomy):
            first = model.get_submodule(f"{name}.{anatomy.steps[0].conv}")
            gate = SpatialMasking().build_gate(first.in_channels, 1)
            count += sum(p.numel() for p in gate.parameters())
    return count


def _conv_macs(model: nn.Module, size: tuple[int, int, int]) -> int:
    """What `dc.profile` counts; its counter takes a second to load, and our networks have plain convolutions only."""
    import torch

    total = 0

    def count(conv: nn.Module, _args: tuple, y: Tensor) -> None:
        nonlocal total
        total += math.prod(y.shape[2:]) * (
            conv.weight.numel() + (0 if conv.bias is None else conv.out_channels)
        )

    handles = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, nn.Conv2d)]
    with torch.inference_mode():
        model.eval()(torch.zeros(1, *size))
    for handle in handles:
        handle.remove()
    return total
