"""`dynaconv study correlation`: how alike feature maps and kernels are, static against dynamic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from dynaconv import _checks
from dynaconv._table import format_table
from dynaconv.cli.datasets import run_dataset
from dynaconv.cli.folders import output_folder
from dynaconv.cli.networks import Opened, check_input_size, open_network
from dynaconv.cli.outcome import Outcome, number, say, share

HELP = "correlation between feature maps and between kernels, static against dynamic"
DESCRIPTION = """
DyNet's study: the Pearson correlation of all pairs of channels of a layer's output, and of all pairs of filters
of a convolution, in a static and in a dynamic network. Computed for each picture and averaged, because dynamic
kernels differ per picture; channels that do not vary are dropped and counted. Writes a histogram, the shares of
strong, middle, weak and no correlation, and the share in [-0.1, 0.2], as CSV, JSON and a figure."""
EXAMPLES = """\
dynaconv study correlation runs/static runs/dyconv
dynaconv study correlation runs/static runs/dyconv --layer layer3 --images 512 --thresholds 0.6 0.3 0.1
dynaconv study correlation timm:mobilenetv2_100 dyconv4_mobilenetv2_100 --data noise --images 16"""


def add_arguments(parser: Any) -> None:
    """Two networks, the layers, the pictures, the buckets."""
    parser.add_argument("static", help="a run folder, a saved network, or a name of `dynaconv models`")
    parser.add_argument("dynamic", help="the same, of a network with dynamic kernels")
    parser.add_argument(
        "--layer", type=str, default=None, help="whose output to correlate; left out, the second-last stage"
    )
    parser.add_argument(
        "--dynamic-layer", type=str, default=None, help="its name in the dynamic network, where it differs"
    )
    parser.add_argument(
        "--kernel-layer", type=str, default=None, help="dynamic convolution; left out, the last of that stage"
    )
    parser.add_argument(
        "--static-kernel-layer", type=str, default=None, help="static convolution; left out, of the same name"
    )
    parser.add_argument(
        "--data",
        type=str,
        default=None,
        help="scenes, imagefolder:DIR, cifar10:DIR or noise; left out, what a run was trained on",
    )
    parser.add_argument("--images", type=int, default=256, help="number of test pictures")
    parser.add_argument("--batch", type=int, default=32, help="pictures computed at once")
    parser.add_argument(
        "--thresholds",
        type=float,
        nargs=3,
        default=[0.5, 0.3, 0.1],
        help="|r| of strong, middle and weak correlation",
    )
    parser.add_argument("--bins", type=int, default=40, help="of the histogram over [-1, 1]")
    parser.add_argument("--out", type=str, default="runs/correlation", help="folder of the study")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def run(args: Any) -> Outcome:
    """Correlate, write, show.

    Raises:
        ValueError: bad input, a network without dynamic kernels, damaged files; FileNotFoundError: no such run.
    """
    from dynaconv.cost import machine_line
    from dynaconv.study import Thresholds
    from dynaconv.study.correlation_run import correlate
    from dynaconv.study.correlation_write import write
    from dynaconv.study.folder import StudyFolder

    for option, value, least in (
        ("--images", args.images, 1),
        ("--batch", args.batch, 1),
        ("--bins", args.bins, 2),
    ):
        _checks.cli_at_least(option, value, least)
    thresholds = Thresholds(*args.thresholds)
    folder = StudyFolder(output_folder(args.out), "correlation")
    folder.check()
    static, dynamic = open_network(args.static), open_network(args.dynamic)
    data, batches, size = _pictures(static, dynamic, args)
    say(f"correlating {args.images} pictures of {data}")
    found = correlate(
        static.model,
        dynamic.model,
        batches,
        size,
        layers=(args.layer, args.dynamic_layer),
        kernels=(args.static_kernel_layer, args.kernel_layer),
        thresholds=thresholds,
        bins=args.bins,
    )
    settings = {"networks": [args.static, args.dynamic], "data": data, "thresholds": vars(thresholds)}
    result = write(folder, found, {**settings, "machine": machine_line()})
    return Outcome(f"{_table(result)}\nCSV, JSON and figure in {folder.path}", {"out": folder.path, **result})


def _pictures(static: Opened, dynamic: Opened, args: Any) -> tuple[str, Iterable[Any], tuple[int, int, int]]:
    """Name of the data, batches of pictures, (C, H, W) of one."""
    from dynaconv.data import load_dataset
    from dynaconv.study.correlation_run import noise

    trained = next((opened for opened in (dynamic, static) if opened.folder is not None), None)
    if args.data == "noise":
        size = (trained or static).input_size
        check_input_size(size, dynamic.model)
        return "noise", noise(args.images, size, args.batch), size
    if trained is not None:
        bundle = run_dataset(trained, args.data)
    elif args.data is not None:
        bundle = load_dataset(args.data, image_size=static.input_size[1], augment=False)
    else:
        raise _checks.cli_no_data_known(args.dynamic)
    count = min(args.images, len(bundle.test))
    starts = range(0, count, args.batch)
    batches = (bundle.test.__getitems__(list(range(s, min(s + args.batch, count))))[0] for s in starts)
    return bundle.name, batches, (3, bundle.image_size, bundle.image_size)


def _table(result: dict[str, Any]) -> str:
    header = ("of", "network", "layer", "S", "M", "W", "N", "in [-0.1, 0.2]", "mean |r|", "rows", "dropped")
    rows = []
    for kind, layers in (("features", result["layers"]), ("kernels", result["kernel_layers"])):
        for network, layer in zip(("static", "dynamic"), layers, strict=True):
            r = result[kind][network]
            buckets = [share(value) for value in r["buckets"].values()]
            cells = [kind, network, layer, *buckets, share(r["inside"]), number(r["mean_abs"])]
            rows.append([*cells, str(r["rows"]), number(r["dropped"], ".1f")])
    images = result["features"]["dynamic"]["images"]
    return f"{format_table(header, rows, 'lll' + 'r' * 8)}\nmeans over {images} pictures of {result['data']}"
