"""What a compactness study holds equal for all networks, as a training recipe."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from dynaconv import _checks
from dynaconv.study.methods import STATIC, Method
from dynaconv.train.recipe import DataSection, ModelSection, OptimSection, Recipe, TrainerSection

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class CompactnessSettings:
    """One schedule for every network of the study.

    Args:
        data: scenes, imagefolder:DIR or cifar10:DIR. image_size: pixels, None keeps the data set's own.
        network: name of the static network. width: its `width` option, None keeps its own.
        train_size: training pictures, the same for all; None takes all.
        epochs, batch_size, optimizer, lr, weight_decay, gradient_clip, warmup_epochs: cosine schedule.
        anneal: share of training over which the temperature of DY-Conv and ODConv falls linearly from 30 to 1.
        precision: auto, fp32 or bf16.
    Raises:
        ValueError: a number out of range.
    """

    data: str = "scenes"
    image_size: int | None = None
    network: str = "resnet8_cifar"
    width: int | None = None
    train_size: int | None = None
    epochs: int = 10
    batch_size: int = 128
    optimizer: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    gradient_clip: float | None = None
    warmup_epochs: float = 1.0
    augment: bool = True
    anneal: float = 0.3
    precision: str = "auto"

    def __post_init__(self) -> None:
        if not 0 <= self.anneal <= 1:
            raise _checks.study_share("--anneal", self.anneal)
        if self.width is not None:
            _checks.train_at_least("--width", self.width, 1)
        self.recipe(Method(STATIC, STATIC), 0)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready form."""
        return asdict(self)

    def recipe(self, method: Method, seed: int) -> Recipe:
        """The recipe of one run; all seeds see the same pictures, and no split chooses among epochs.

        Raises:
            ValueError: the method's number is out of range.
        """
        data = DataSection(
            self.data,
            image_size=self.image_size,
            train_size=self.train_size,
            batch_size=self.batch_size,
            augment=self.augment,
        )
        optim = OptimSection(
            name=self.optimizer, lr=self.lr, weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs
        )
        trainer = TrainerSection(
            epochs=self.epochs,
            precision=self.precision,
            gradient_clip=self.gradient_clip,
            seed=seed,
            best="last",
        )
        width = method.width or self.width
        model = ModelSection(self.network, options={} if width is None else {"width": width})
        kernels = method.kernels(self.anneal * self.epochs)
        return Recipe(model, data, kernels=kernels, optim=optim, trainer=trainer)


# Minutes on one core, on pictures that need no download.
SCENES = CompactnessSettings(
    data="scenes",
    image_size=64,
    network="resnet8_scenes",
    width=8,
    train_size=6000,
    epochs=8,
    batch_size=32,
    optimizer="adamw",
    lr=8e-3,
    weight_decay=0.05,
    gradient_clip=5.0,
    augment=False,
)


def changed(base: Settings, changes: dict[str, Any]) -> Settings:
    """The settings with what was asked for instead; None leaves the default."""
    return replace(base, **{key: value for key, value in changes.items() if value is not None})


def default_settings(data: str, **changes: Any) -> CompactnessSettings:
    """The settings for a data set, with what was asked for instead (None leaves the default).

    >>> default_settings("scenes", epochs=2).epochs
    2
    """
    return changed(SCENES if data == "scenes" else CompactnessSettings(data=data), changes)
