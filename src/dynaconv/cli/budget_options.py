"""Options that the studies of budgets share."""

from __future__ import annotations

from typing import Any

from dynaconv import _checks
from dynaconv.cli.networks import need_static_name
from dynaconv.study.budget_settings import BudgetSettings, budget_settings


def add_options(parser: Any, out: str, image_size: bool = True) -> None:
    """The data, the network, the schedule.

    Args:
        out: default folder. image_size: whether the pictures have one size.
    """
    parser.add_argument(
        "--data", type=str, default="scenes", help="scenes, imagefolder:DIR or cifar10:DIR (default scenes)"
    )
    if image_size:
        parser.add_argument("--image-size", type=int, default=None, help="side of the pictures in pixels")
    parser.add_argument("--train-size", type=int, default=None, help="training pictures; left out, all")
    parser.add_argument("--network", type=str, default=None, help="static network, a name of dynaconv models")
    parser.add_argument("--width", type=int, default=None, help="its channels, where it has that option")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each network, seeds 0, 1, ...")
    parser.add_argument("--dense-epochs", type=int, default=None, help="of the dense start")
    parser.add_argument("--epochs", type=int, default=None, help="of every dynamic network")
    parser.add_argument("--batch", type=int, default=None, help="pictures in a training step")
    parser.add_argument(
        "--lr", type=float, default=None, help="highest learning rate of the dynamic networks"
    )
    parser.add_argument(
        "--dense-lr", type=float, default=None, help="highest learning rate of the dense start"
    )
    parser.add_argument("--precision", type=str, default=None, help="auto, fp32 or bf16")
    parser.add_argument("--out", type=str, default=out, help="folder of the study")
    parser.add_argument("--quiet", action="store_true", help="no line for every epoch")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def settings_of(args: Any, **more: Any) -> BudgetSettings:
    """The settings that the options ask for.

    Raises:
        ValueError: no seed, an unknown network.
    """
    _checks.cli_at_least("--seeds", args.seeds, 1)
    need_static_name(args.network)
    return budget_settings(args.data, image_size=args.image_size, **schedule_of(args), **more)


def schedule_of(args: Any) -> dict[str, Any]:
    """What the options say about network and schedule; None where they say nothing."""
    return {
        "train_size": args.train_size,
        "network": args.network,
        "width": args.width,
        "dense_epochs": args.dense_epochs,
        "dense_lr": args.dense_lr,
        "epochs": args.epochs,
        "batch_size": args.batch,
        "lr": args.lr,
        "precision": args.precision,
    }
