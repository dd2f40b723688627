"""What the studies of budgets hold equal: data, network, the dense start, and the schedule of the dynamic networks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from dynaconv import _checks
from dynaconv.study.settings import changed
from dynaconv.train.recipe import Recipe


@dataclass(frozen=True)
class BudgetSettings:
    """One dense start and one schedule for every dynamic network of a study.

    Args:
        data: scenes, imagefolder:DIR or cifar10:DIR. image_size: pixels, None keeps the data set's own.
        object_share: of scenes, share of the picture that the digit covers, None for digits of mixed size.
        network: name of the static network. width: its `width` option, None keeps its own.
        train_size: training pictures; None takes all.
        dense_epochs, dense_lr: of the dense network that the others start from.
        epochs, lr: of the dynamic ones. batch_size, optimizer, weight_decay, gradient_clip, warmup_epochs, augment: of
            both, cosine schedule.
        ramp, noise_until: of the budget, shares of training.
        target: budget of the `fixes` study, share of the conditional MACs.
    """

    data: str
    image_size: int | None = None
    network: str = "resnet8_cifar"
    width: int | None = None
    train_size: int | None = None
    dense_epochs: int = 15
    dense_lr: float = 0.1
    epochs: int = 15
    lr: float = 0.05
    batch_size: int = 128
    optimizer: str = "sgd"
    weight_decay: float = 5e-4
    gradient_clip: float | None = None
    warmup_epochs: float = 1.0
    augment: bool = True
    ramp: float = 0.4
    noise_until: float = 0.6
    target: float = 0.3
    precision: str = "auto"
    object_share: float | None = None

    def __post_init__(self) -> None:
        _checks.fraction("--target", self.target)
        self.dense_recipe(0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def dense_recipe(self, seed: int, start: str | None = None) -> Recipe:
        """The dense start, from scratch or from a run of the same network."""
        return self._recipe(seed, self.dense_epochs, self.dense_lr, {"trainer": {"init_from": start}}, {})

    def recipe(
        self,
        seed: int,
        dense_run: str,
        changes: dict[str, dict[str, Any]],
        calibrate: Sequence[float] = (),
    ) -> Recipe:
        """A dynamic network that starts from the dense run; `changes` are keys of recipe sections."""
        masking = {"preset": "default", **changes.get("masking", {})}
        budget = {"target": self.target, "ramp": self.ramp, "noise_until": self.noise_until}
        sections: dict[str, Any] = {
            "masking": masking,
            "budget": {**budget, **changes.get("budget", {})},
            "calibrate": list(calibrate),
        }
        optim = {"gate_weight_decay": 0.0, **changes.get("optim", {})}
        trainer = {"init_from": dense_run, **changes.get("trainer", {})}
        return self._recipe(seed, self.epochs, self.lr, {"optim": optim, "trainer": trainer}, sections)

    def _recipe(
        self,
        seed: int,
        epochs: int,
        lr: float,
        more: dict[str, dict[str, Any]],
        sections: dict[str, Any],
    ) -> Recipe:
        from dynaconv.train import load_recipe

        data = {"name": self.data, "batch_size": self.batch_size, "augment": self.augment}
        optim = {"name": self.optimizer, "lr": lr, "weight_decay": self.weight_decay}
        trainer = {
            "epochs": epochs, "seed": seed, "best": "last", "precision": self.precision,
            "gradient_clip": self.gradient_clip,
        }  # fmt: skip
        # fmt: off
        made = {
            "model": {
                "name": self.network,
                "options": {} if self.width is None else {"width": self.width},
            },
            "data": {
                **data, "image_size": self.image_size, "train_size": self.train_size,
                "object_share": self.object_share,
            },
            "optim": {**optim, "warmup_epochs": self.warmup_epochs, **more.get("optim", {})},
            "trainer": {**trainer, **more.get("trainer", {})},
            **sections,
        }
        # fmt: on
        return load_recipe(made)


# Minutes on one core, on pictures that need no download.
SCENES = BudgetSettings(
    data="scenes",
    image_size=64,
    network="resnet8_scenes",
    train_size=6000,
    dense_epochs=6,
    dense_lr=4e-3,
    epochs=5,
    lr=1.5e-3,
    batch_size=32,
    optimizer="adamw",
    weight_decay=0.05,
    gradient_clip=5.0,
    augment=False,
)


def budget_settings(data: str, **changes: Any) -> BudgetSettings:
    """The settings for a data set, with what was asked for instead (None leaves the default).

    >>> budget_settings("scenes", epochs=2).epochs
    2
    """
    return changed(SCENES if data == "scenes" else BudgetSettings(data=data), changes)
