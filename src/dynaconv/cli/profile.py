"""`dynaconv profile`: multiply-adds and parameters, layer by layer."""

from __future__ import annotations

import contextlib
from typing import Any

from dynaconv import _checks
from dynaconv.cli.networks import Opened, check_input_size, choose_targets, open_network, set_target
from dynaconv.cli.outcome import Outcome

HELP = "count multiply-adds and parameters, layer by layer"
DESCRIPTION = """
Counts the multiply-adds (MACs; FLOPs are twice as many) of a network: dense, as if everything were
computed; executed, what the masks ask for on these pictures; routing, the part that decides. For a run the
pictures come from its data set; for a network by name they are noise, and its masks are those of untrained
gates unless --density forces them. Milliseconds are measured by dynaconv bench."""
EXAMPLES = """\
dynaconv profile runs/demo --target 0.3
dynaconv profile timm:resnet50 --input-size 3 224 224
dynaconv profile torchvision:mobilenet_v2 --dynamize --density 0.5 --json"""


def add_arguments(parser: Any) -> None:
    """The network, the pictures, the masks."""
    parser.add_argument(
        "model", help="a run folder, a saved network, or a name of `dynaconv models`, timm:, torchvision:"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        default=None,
        metavar=("C", "H", "W"),
        help="channels, height and width of a picture in pixels; left out, what the network was made for",
    )
    parser.add_argument(
        "--batch", type=int, default=8, help="number of pictures that executed MACs are averaged over"
    )
    parser.add_argument(
        "--target", type=float, default=None, help="calibrated budget, a share of the conditional MACs"
    )
    parser.add_argument(
        "--density", type=float, default=None, help="force masks with this share of open positions, 0..1"
    )
    parser.add_argument(
        "--dynamize", action="store_true", help="convert a static network first (dc.dynamize_)"
    )
    parser.add_argument(
        "--include-linear", action="store_true", help="count linear layers in the totals as well"
    )
    parser.add_argument("--json", action="store_true", help="print the profile as JSON")


def run(args: Any) -> Outcome:
    """Count and show.

    Raises:
        ValueError: an unknown network, wrong channels, a target that it is not calibrated for, nothing to convert.
    """
    import dynaconv as dc
    from dynaconv.testing import force_masks

    _checks.cli_at_least("--batch", args.batch, 1)
    opened = open_network(args.model)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    check_input_size(size, opened.model)
    if args.dynamize:
        dc.dynamize_(opened.model, input_size=size)
    asked = None if args.target is None else [args.target]
    if asked:
        set_target(opened.model, choose_targets(opened.model, asked)[0])
    x, source = pictures(opened, size, args.batch)
    masks = contextlib.nullcontext() if args.density is None else force_masks(opened.model, args.density)
    try:
        with masks:
            counted = dc.profile(opened.model, x, include_linear=args.include_linear)
    except RuntimeError as error:
        raise _checks.cli_refused_input(size, error) from None
    text = counted.table()
    if dc.gates(opened.model):
        told = source if args.density is None else f"masks forced to density {args.density:g}"
        text += f"\npictures: {told}"
    facts = {"model": opened.name, "target": args.target, "density": args.density, "pictures": source}
    return Outcome(text, {**facts, **counted.to_dict()})


def pictures(opened: Opened, size: tuple[int, int, int], count: int) -> tuple[Any, str]:
    """Pictures [count, C, H, W] of the run's own data set where that is at hand, else noise; and which it was."""
    import torch

    from dynaconv.cli.datasets import run_dataset
    from dynaconv.cli.outcome import say

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(count, *size, generator=generator)
    if opened.folder is None or size != opened.input_size:
        return noise, "noise"
    try:
        bundle = run_dataset(opened)
    except (ValueError, OSError, ImportError) as error:
        say(f"noise instead of pictures: {error}")
        return noise, "noise"
    available = min(count, len(bundle.test))
    images, _ = bundle.test.__getitems__(list(range(available)))
    return images, f"the first {available} of the test split of {bundle.name}"
