"""`dynaconv bench`: milliseconds, dense against dynamic, interleaved, after checking that they agree."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.bench_kernels import run_kernels
from dynaconv.cli.networks import Opened, check_input_size, choose_targets, open_network, set_target
from dynaconv.cli.outcome import CommandFailed, Outcome, number, say
from dynaconv.cli.profile import pictures

HELP = "measure milliseconds, dense against dynamic"
DESCRIPTION = """
First checks that skipping gives the numbers that computing everything gives (exit code 1 when not, and no
times), then times the network at each budget against the same network without gates. Rounds are interleaved
in one process, so that a noisy machine disturbs all alike; minimum and median are shown, with the share of
MACs beside the share of milliseconds. For a run the masks come from pictures of its own data set; a network
by name gets forced blob-shaped masks, because its gates are not trained. `dynaconv bench kernels` times the
strategies of dynamic convolutions instead, against the static convolution and timm's layer; with --write it
makes the table by which execution="auto" chooses."""
EXAMPLES = """\
dynaconv bench runs/demo
dynaconv bench runs/demo --target 0.3 --batch 1 8 32 --threads 1
dynaconv bench timm:resnet50 --dynamize --force-density 0.5 --json
dynaconv bench kernels"""
TOLERANCE = 1e-4
DEFAULT_DENSITY = 0.5
BATCHES, ROUNDS = [1, 32], 25


def add_arguments(parser: Any) -> None:
    """The network, its masks, how to time."""
    parser.add_argument(
        "model",
        help="a run folder, a saved network, a name of `dynaconv models`, timm:, torchvision:, or kernels",
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=None,
        help="batch sizes to time, in pictures (default 1 32; kernels: 1 8 32)",
    )
    parser.add_argument(
        "--target",
        type=float,
        nargs="+",
        default=None,
        help="calibrated budgets; left out, all that the run has",
    )
    parser.add_argument(
        "--force-density",
        type=float,
        default=None,
        help="force masks with this share of open positions, 0..1, instead",
    )
    parser.add_argument(
        "--dynamize", action="store_true", help="convert a static network first (dc.dynamize_)"
    )
    parser.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        default=None,
        metavar=("C", "H", "W"),
        help="picture in pixels, for noise",
    )
    parser.add_argument(
        "--threads", type=int, default=None, help="threads to compute with; left out, torch's own number"
    )
    parser.add_argument(
        "--rounds", type=int, default=None, help="interleaved measurements of each (default 25; kernels: 7)"
    )
    parser.add_argument(
        "--write", action="store_true", help="kernels: make the table that execution='auto' reads"
    )
    parser.add_argument(
        "--layout",
        choices=("both", "contiguous", "channels-last"),
        default="both",
        help="kernels: memory format of the input",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


@dataclass
class Rival:
    """One dynamic network that is timed: at a budget, or with forced masks."""

    label: str
    model: nn.Module
    target: float | None
    density: float | None


def run(args: Any) -> Outcome:
    """Check, time, show.

    Raises:
        ValueError: bad input; CommandFailed: skipping and computing everything disagree.
    """
    import dynaconv as dc

    _check_numbers(args)
    if args.model == "kernels":
        with _threads(args.threads):
            return run_kernels(args)
    if args.write:
        raise ValueError("--write makes the table of `dynaconv bench kernels`; networks have none")
    args.batch, args.rounds = args.batch or BATCHES, args.rounds or ROUNDS
    opened = open_network(args.model)
    size = tuple(args.input_size) if args.input_size else opened.input_size
    check_input_size(size, opened.model)
    if args.dynamize:
        dc.dynamize_(opened.model, input_size=size)
    if not dc.gates(opened.model):
        raise _checks.cli_already_static(opened.name)
    with _threads(args.threads), contextlib.ExitStack() as stack:
        rivals = _rivals(opened, args, stack)
        return _measure(opened, rivals, size, args)


def _check_numbers(args: Any) -> None:
    for batch in args.batch or ():
        _checks.cli_at_least("--batch", batch, 1)
    if args.rounds is not None:
        _checks.cli_at_least("--rounds", args.rounds, 1)
    if args.threads is not None:
        _checks.cli_at_least("--threads", args.threads, 1)
    if args.force_density is not None and args.target is not None:
        raise ValueError(
            "--target and --force-density exclude each other: masks are either decided or forced"
        )


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _rivals(opened: Opened, args: Any, stack: contextlib.ExitStack) -> list[Rival]:
    """Copies of the network, one for each budget, or one with forced masks."""
    from dynaconv.testing import force_masks

    density = args.force_density
    if density is None and args.target is None and opened.folder is None:
        density = DEFAULT_DENSITY
    if density is not None:
        model = copy.deepcopy(opened.model)
        stack.enter_context(force_masks(model, density))
        return [Rival(f"density {density:g}", model, None, density)]
    rivals = []
    for target in choose_targets(opened.model, args.target):
        model = copy.deepcopy(opened.model)
        set_target(model, target)
        rivals.append(Rival("as trained" if target is None else f"target {target:g}", model, target, None))
    return rivals


def _measure(opened: Opened, rivals: list[Rival], size: tuple[int, int, int], args: Any) -> Outcome:
    from dynaconv.cost import machine_line
    from dynaconv.measure import dense_twin

    x, source = pictures(opened, size, max(*args.batch, 8))
    deviations = {rival.label: verify(rival.model, x[:8], rival.label) for rival in rivals}
    say(
        f"skipping agrees with computing everything (largest deviation {max(deviations.values()):.1e}); timing ..."
    )
    batches = sorted({batch for batch in args.batch if batch <= len(x)})
    dense = dense_twin(opened.model)
    timed = {str(batch): _time(dense, rivals, x, batch, args.rounds) for batch in batches}
    masks = (
        f"forced, density {rivals[0].density:g}" if rivals[0].density is not None else "decided by the gates"
    )
    data = {
        "model": opened.name,
        "machine": machine_line(),
        "input_size": list(size),
        "masks": masks,
        "pictures": source,
        "dense": "the same network without gates (dc.revert_), batch norm folded in both",
        "largest_deviation": deviations,
        "batches": timed,
    }
    return Outcome(_text(data), data)


def verify(model: nn.Module, x: Tensor, label: str) -> float:
    """Largest relative deviation of skipping from computing everything.

    Raises:
        CommandFailed: above 1e-4, naming the worst block.
    """
    from dynaconv.measure import compare_with_dense

    deviations = compare_with_dense(model, x)
    worst = max(deviations, key=deviations.__getitem__)
    if not deviations[worst] <= TOLERANCE:
        raise CommandFailed(
            f"at {label}, skipping differs from computing everything by {deviations[worst]:.1e} in block {worst!r} "
            f"(allowed {TOLERANCE:.0e}); nothing was timed, please report this with the output of `dynaconv doctor`"
        )
    return deviations[worst]


def _time(dense: nn.Module, rivals: list[Rival], x: Tensor, batch: int, rounds: int) -> dict[str, Any]:
    import dynaconv as dc
    from dynaconv.measure import latency_ratios

    # A dynamic network's time depends on its pictures, so small batches are timed on several.
    groups = [x[s : s + batch] for s in range(0, len(x) - batch + 1, batch)][: max(1, 8 // batch)]
    times = latency_ratios(dense, {r.label: r.model for r in rivals}, groups, rounds=rounds)
    points = []
    for rival in rivals:
        profiles = [dc.profile(rival.model, group) for group in groups]
        points.append(
            {
                "label": rival.label,
                "target": rival.target,
                "density": rival.density,
                "conditional_ratio": sum(p.conditional_ratio for p in profiles) / len(profiles),
                "macs_ratio": sum(p.macs_ratio for p in profiles) / len(profiles),
                **times[rival.label],
            }
        )
    return {"dense": times["dense"], "points": points}


def _text(data: dict[str, Any]) -> str:
    header = ("batch", "network", "MACs/dense", "min ms", "median ms", "min/dense", "median/dense")
    rows = []
    for batch, timed in data["batches"].items():
        rows.append(
            (
                batch,
                "dense",
                "1.000",
                number(timed["dense"]["min_ms"]),
                number(timed["dense"]["median_ms"]),
                "",
                "",
            )
        )
        for p in timed["points"]:
            ms, ratios = (p["min_ms"], p["median_ms"]), (p["ratio_min"], p["ratio_median"])
            rows.append((batch, p["label"], number(p["macs_ratio"]), *map(number, (*ms, *ratios))))
    size = "x".join(map(str, data["input_size"]))
    return "\n".join(
        [
            f"{data['model']} at {size}; pictures: {data['pictures']}; masks: {data['masks']}",
            f"dense is {data['dense']}; above its break-even share of MACs a block computes densely",
            data["machine"],
            "",
            format_table(header, rows, "rlrrrrr"),
            "Ratios below 1 are faster; the share of MACs is the limit of the share of milliseconds.",
        ]
    )
