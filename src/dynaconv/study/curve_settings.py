"""What the study of accuracy against multiply-adds holds equal, and the axes along which its networks differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from dynaconv import _checks
from dynaconv.study.budget_settings import SCENES, BudgetSettings
from dynaconv.study.settings import changed
from dynaconv.train.recipe import Recipe

DENSE = "dense"
# What a recipe's masking section says for each method.
METHODS: dict[str, dict[str, Any]] = {
    "dynconv": {"method": "spatial_masking"},
    "layer-gate": {"method": "layer_gate"},
    "halting": {"method": "halting", "options": {"level": "position"}},
    "halting-image": {"method": "halting", "options": {"level": "image"}},
    "channel-gate": {"method": "channel_gate"},
    "random": {"method": "random_masking"},
    "narrow": {"method": "narrow"},
}
# Gates of a few numbers have a long way to go from open to their budget in a short training: a random mask is one
# number a block, moved by the budget alone.
GATE_LEARNING_RATE = {"layer-gate": 5.0, "halting": 5.0, "halting-image": 5.0, "random": 50.0}
TITLES = {
    DENSE: "static",
    "dynconv": "DynConv",
    "layer-gate": "LayerGate (AIG)",
    "halting": "Halting (SACT)",
    "halting-image": "Halting (ACT)",
    "channel-gate": "ChannelGate",
    "random": "random masks",
    "narrow": "channels cut",
}
# The study's own network has two blocks in a stage: halting needs a second one.
NETWORKS = {"scenes": "resnet14_scenes", "cifar10": "resnet14_cifar"}
WIDTH = 16
# With two blocks in a stage the digits of scenes are found only after five epochs or six.
SCENES_DENSE_EPOCHS = 12


@dataclass(frozen=True)
class CurveSettings(BudgetSettings):
    """One schedule for all networks of the study; the size of pictures and objects is an axis, not a setting.

    hold: training itself ends at the budget, for every method (see `MacBudget`); without, calibration takes all at once
        what training missed.
    """

    hold: bool = True

    def to_dict(self) -> dict[str, Any]:
        """What has to stay the same in a folder."""
        axes = ("image_size", "object_share", "target")
        return {key: value for key, value in asdict(self).items() if key not in axes}

    def at(self, image_size: int | None, object_share: float | None) -> CurveSettings:
        """The same on pictures of one size with objects of one size."""
        return replace(self, image_size=image_size, object_share=object_share)

    def static_recipe(self, seed: int, width: int | None, start: str | None = None) -> Recipe:
        """A static network with as many epochs as a dynamic one and its dense start together; start: a run of it."""
        epochs = self.dense_epochs + self.epochs
        return replace(self, width=width, dense_epochs=epochs).dense_recipe(seed, start)

    def method(self, method: str, target: float) -> dict[str, dict[str, Any]]:
        """What a recipe says for a method; target: share of the conditional MACs."""
        masking = dict(METHODS[method])
        if method == "narrow":
            masking["options"] = {"budget": target}
        optim = {"gate_lr_multiplier": GATE_LEARNING_RATE.get(method, 1.0)}
        return {"masking": masking, "optim": optim, "budget": {"target": target, "hold": self.hold}}


def curve_settings(data: str, **changes: Any) -> CurveSettings:
    """The settings for a data set, with what was asked for instead (None leaves the default).

    >>> curve_settings("scenes", epochs=2).network
    'resnet14_scenes'
    """
    scenes = asdict(SCENES) | {"image_size": None, "dense_epochs": SCENES_DENSE_EPOCHS}
    base = CurveSettings(**scenes) if data == "scenes" else CurveSettings(data=data)
    kind = data.partition(":")[0]
    if changes.get("network") is None:
        base = replace(base, network=NETWORKS.get(kind, "resnet14_cifar"), width=WIDTH)
    return changed(base, changes)


@dataclass(frozen=True)
class Axes:
    """What to train: every combination.

    Args:
        methods: "dense" and names of METHODS. budgets: shares of the dense network's multiply-adds, gates included.
        widths: of the static networks; empty takes those that cost as much as the budgets.
        seeds: how many. image_sizes: pixels, None for the data set's own. object_shares: of scenes, None for mixed.
    """

    methods: Sequence[str]
    budgets: Sequence[float]
    widths: Sequence[int] = ()
    seeds: int = 1
    image_sizes: Sequence[int | None] = (None,)
    object_shares: Sequence[float | None] = (None,)

    def check(self, settings: BudgetSettings) -> None:
        """Raise ValueError where something is unknown, out of range, or named twice."""
        if not self.methods:
            raise _checks.study_none_given("--methods", (DENSE, *METHODS))
        for method in self.methods:
            _checks.one_of("method", method, (DENSE, *METHODS))
        _checks.ascending_targets([_checks.fraction("--budgets", budget) for budget in self.budgets])
        named = {
            "--methods": self.methods,
            "--widths": self.widths,
            "--image-sizes": self.image_sizes,
            "--object-shares": self.object_shares,
        }
        for option, values in named.items():
            if len(set(values)) < len(values):
                raise _checks.study_twice(option, values)
        for width in self.widths:
            _checks.cli_at_least("--widths", width, 1)
        if self.widths and settings.width is None:
            raise _checks.study_no_widths(settings.network)
        if settings.data != "scenes" and any(share is not None for share in self.object_shares):
            raise _checks.data_no_object_share(settings.data)

    def static_widths(self, settings: BudgetSettings) -> list[int | None]:
        """Widths of the static networks, the full one last.

        >>> Axes(("dense",), (0.3, 0.5)).static_widths(curve_settings("scenes"))
        [8, 12, 16]
        """
        full = settings.width
        if full is None:
            return [None]
        step = max(1, full // 8)
        asked = self.widths or [max(step, round(full * b**0.5 / step) * step) for b in self.budgets]
        return sorted({*asked, full})


def width_of(network: str) -> int | None:
    """The `width` option that a network has when nothing is said; None where it has no such option."""
    from dynaconv.models import create_model
    from dynaconv.models.cifar_resnet import CifarResNet

    model = create_model(network)
    return model.conv1.out_channels if isinstance(model, CifarResNet) else None
