"""What a training run is made of: frozen dataclasses, one for each section of a recipe file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from dynaconv import _checks
from dynaconv.budget.losses import KINDS
from dynaconv.budget.schedules import GateSchedule
from dynaconv.convert import GateConfig, SpatialMasking, config_from_dict
from dynaconv.convert.configs import GATE_CONFIGS
from dynaconv.convert.scopes import METHODS

OPTIMIZERS = ("sgd", "adamw", "adam")
SCHEDULES = ("cosine", "multistep", "constant")
PRECISIONS = ("auto", "fp32", "bf16")
ACCELERATORS = ("auto", "cpu", "gpu")
BEST = ("budget", "accuracy", "last")


@dataclass(frozen=True)
class ModelSection:
    """The static network to start from.

    Args:
        name: a name that `dynaconv models` lists, or timm:NAME, torchvision:NAME.
        num_classes: outputs; left out, the data set's number of classes.
        options: further options of the network, such as {width: 16}.
    """

    name: str
    num_classes: int | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskingSection:
    """What decides in the residual blocks; without this section the network stays dense.

    Args:
        method: spatial_masking (DynConv), layer_gate (ConvNet-AIG), halting (SACT, ACT), channel_gate, and the controls
            random_masking and narrow. The next seven options are those of spatial_masking; preset also fits layer_gate
            and halting.
        preset: "paper" reproduces the publication (arXiv 1912.03203 for masks), "default" is our recommendation; a
            preset fills what is left out.
        unit: "squeeze" (classification) or "conv1x1" (cheaper).
        granularity: one decision for granularity x granularity positions; a list has one number for each resolution.
        temperature: of the straight-through gradient.
        init: of the mask units: "paper", "default" or "open".
        dilation_gradient: "none", "marginal" or "max".
        norm: batch norm inside the mask units.
        options: of another method's config, such as {level: image} for halting.
    """

    preset: str = "default"
    unit: str = "squeeze"
    granularity: int | list[int] = 1
    temperature: float | None = None
    init: str | None = None
    dilation_gradient: str | None = None
    norm: bool = False
    method: str = "spatial_masking"
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config()

    def config(self) -> GateConfig:
        """The config for `dynamize_`."""
        _checks.one_of("masking.method", self.method, [config.kind for config in GATE_CONFIGS])
        own = {k: v for k, v in asdict(self).items() if k not in ("method", "options")}
        if self.method == SpatialMasking.kind:
            return config_from_dict({"kind": self.method, **own, **self.options})
        changed = {f.name for f in fields(self) if f.name in own and own[f.name] != f.default}
        known = {f.name for f in fields(next(c for c in GATE_CONFIGS if c.kind == self.method))}
        kept = {k: own[k] for k in changed & known}
        if changed - known:
            raise _checks.train_foreign_option(self.method, sorted(changed - known), sorted(known))
        return config_from_dict({"kind": self.method, **kept, **self.options})


@dataclass(frozen=True)
class KernelsSection:
    """Dynamic kernels; without this section the kernels are those of the network.

    Args:
        method: condconv, dyconv, dynet, dcd, odconv or weightnet.
        options: further options of the config, such as {num_kernels: 4, init: exact}. A network that starts from
            trained weights (trainer.init_from) is converted exactly, any other one draws its experts anew.
        layers: names or re:patterns of layers; left out, those that the method's paper makes dynamic.
        start_temperature: of attention (DY-Conv and ODConv), where training begins.
        end_temperature: where it ends.
        anneal_epochs: epochs from one to the other; left out, 10 as in the papers, but at most a third of training.
    """

    method: str = "dyconv"
    options: dict[str, Any] = field(default_factory=dict)
    layers: list[str] = field(default_factory=list)
    start_temperature: float = 30.0
    end_temperature: float = 1.0
    anneal_epochs: float | None = None

    def __post_init__(self) -> None:
        _checks.one_of("kernels.method", self.method, METHODS)
        _checks.positive("kernels.start_temperature", self.start_temperature)
        _checks.positive("kernels.end_temperature", self.end_temperature)
        if self.anneal_epochs is not None:
            _checks.positive("kernels.anneal_epochs", self.anneal_epochs)
        self.config("exact")

    def config(self, init: str) -> Any:
        """The config for `dynamize_`, or rules by name."""
        config = config_from_dict({"kind": self.method, "init": init, **self.options})
        return dict.fromkeys(self.layers, config) if self.layers else config


@dataclass(frozen=True)
class BudgetSection:
    """The compute budget that a dynamic network is trained under; needs masks.

    Args:
        target: share of the conditional MACs to execute, in (0, 1].
        alpha: weight of the budget loss.
        anneal: share of training over which blocks become free to move away from the target.
        ramp: share of training over which the target falls from 1 to `target`; 0 aims at it at once.
        noise_until: share of training with Gumbel noise in the gates.
        temperature: steps [[from progress, value], ...] of the gates' temperature; left out, it stays as it is.
        scope: "conditional" (masked blocks only) or "total" (the whole network).
        loss: "network" (DynConv's) or "blocks" (ConvNet-AIG's: every block meets the target).
        ponder: weight of the ponder cost of halting units.
        dial: [low, high]: every step aims at another budget in this range, so that one network learns them all;
            `target` is then the one that it is validated at.
        hold: after the ramp, add up what the target is missed by and aim as much lower, so that training ends at the
            budget and calibration changes little.
    """

    target: float = 0.5
    alpha: float = 10.0
    anneal: float = 0.33
    ramp: float = 0.0
    noise_until: float = 0.8
    temperature: list[tuple[float, float]] | None = None
    scope: str = "conditional"
    loss: str = "network"
    ponder: float = 0.0
    dial: list[float] | None = None
    hold: bool = False

    def __post_init__(self) -> None:
        _checks.fraction("budget.target", self.target)
        _checks.one_of("budget.loss", self.loss, KINDS)
        _checks.train_at_least("budget.ponder", self.ponder, 0)
        if self.dial is not None:
            _checks.dial_range(self.dial)
        _checks.fraction("budget.anneal", self.anneal)
        _checks.train_at_least("budget.alpha", self.alpha, 0)
        if not 0 <= self.ramp < 1:
            raise _checks.train_ramp(self.ramp)
        _checks.one_of("budget.scope", self.scope, ("conditional", "total"))
        self.schedule()

    def schedule(self) -> GateSchedule:
        """Noise and temperature over training."""
        return GateSchedule(self.noise_until, self.temperature)


@dataclass(frozen=True)
class DataSection:
    """The pictures.

    Args:
        name: scenes, imagefolder:DIR, food101:DIR or cifar10:DIR.
        image_size: side of the square pictures in pixels; left out, the data set's own.
        train_size: number of training pictures; left out, all.
        batch_size: pictures in a step, summed over all processes of a distributed run.
        augment: random crops and flips (or the data set's own kind of augmentation).
        num_workers: processes that load pictures.
        seed: of the data set, its order and its augmentation.
        strict: stop at the first unreadable picture instead of leaving it out.
        classes: of food101 and imagefolder: a seeded choice of so many classes; left out, all.
        object_share: of scenes: share of the picture that the digit's box covers; left out, digits of mixed size.
    """

    name: str
    image_size: int | None = None
    train_size: int | None = None
    batch_size: int = 64
    augment: bool = True
    num_workers: int = 0
    seed: int = 0
    strict: bool = False
    object_share: float | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        _checks.train_at_least("data.batch_size", self.batch_size, 1)
        _checks.train_at_least("data.num_workers", self.num_workers, 0)
        for name in ("image_size", "train_size"):
            if getattr(self, name) is not None:
                _checks.train_at_least(f"data.{name}", getattr(self, name), 1)


@dataclass(frozen=True)
class OptimSection:
    """Optimizer and learning rate.

    Args:
        name: sgd, adamw or adam.
        lr: highest learning rate.
        momentum: of sgd.
        nesterov: of sgd.
        weight_decay: of all parameters but the gates'.
        schedule: cosine (to 0), multistep or constant.
        milestones: epochs at which multistep multiplies the rate by gamma.
        gamma: factor of multistep.
        warmup_epochs: epochs, or a part of one, over which the rate rises from 0.
        gate_lr_multiplier: the gates' learning rate as a multiple of lr.
        gate_weight_decay: the gates' weight decay; left out, none, but weight_decay with masking.preset paper.
    """

    name: str = "sgd"
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: list[int] = field(default_factory=list)
    gamma: float = 0.1
    warmup_epochs: float = 0.0
    gate_lr_multiplier: float = 1.0
    gate_weight_decay: float | None = None

    def __post_init__(self) -> None:
        _checks.one_of("optim.name", self.name, OPTIMIZERS)
        _checks.one_of("optim.schedule", self.schedule, SCHEDULES)
        _checks.positive("optim.lr", self.lr)
        _checks.train_at_least("optim.weight_decay", self.weight_decay, 0)
        _checks.train_at_least("optim.warmup_epochs", self.warmup_epochs, 0)
        if self.schedule == "multistep" and not self.milestones:
            raise _checks.train_needs("optim.schedule multistep", "optim.milestones", "[150, 250]")


@dataclass(frozen=True)
class TrainerSection:
    """How long and how to train.

    Args:
        epochs: passes over the training pictures.
        precision: fp32, bf16, or auto (bf16 where the processor has native bf16 arithmetic).
        accelerator: auto, cpu or gpu.
        gradient_clip: largest norm of the gradient; left out, no clipping.
        seed: of the weights and of the gates' noise.
        label_smoothing: share of the label spread over all classes.
        init_from: a run or model folder with dense weights to start from.
        teacher: a run or model folder of a dense network to learn from.
        distill_weight: weight of the distance to the teacher's answers.
        distill_temperature: temperature of that distance.
        best: which epoch the run keeps: "budget" is the best validation accuracy within the budget (+ 0.02), "accuracy"
            the best whatever its cost, as in the paper's code, "last" simply the last one.
    """

    epochs: int = 10
    precision: str = "auto"
    accelerator: str = "auto"
    gradient_clip: float | None = None
    seed: int = 0
    label_smoothing: float = 0.0
    init_from: str | None = None
    teacher: str | None = None
    distill_weight: float = 0.0
    distill_temperature: float = 4.0
    best: str = "budget"

    def __post_init__(self) -> None:
        _checks.train_at_least("trainer.epochs", self.epochs, 1)
        _checks.one_of("trainer.precision", self.precision, PRECISIONS)
        _checks.one_of("trainer.accelerator", self.accelerator, ACCELERATORS)
        _checks.one_of("trainer.best", self.best, BEST)
        _checks.positive("trainer.distill_temperature", self.distill_temperature)
        _checks.train_at_least("trainer.distill_weight", self.distill_weight, 0)
        if self.gradient_clip is not None:
            _checks.positive("trainer.gradient_clip", self.gradient_clip)
        if not 0 <= self.label_smoothing < 1:
            raise _checks.train_smoothing(self.label_smoothing)


@dataclass(frozen=True)
class Recipe:
    """A whole training run.

    Args:
        model, data, optim, trainer: always there.
        masking, budget: None for a dense network. kernels: None for static kernels.
        calibrate: budgets to calibrate for after training; may be empty.
    Raises:
        ValueError: masks without a budget, or a value out of range.

    >>> Recipe(ModelSection("resnet8_scenes"), DataSection("scenes")).dynamic
    False
    """

    model: ModelSection
    data: DataSection
    masking: MaskingSection | None = None
    kernels: KernelsSection | None = None
    budget: BudgetSection | None = None
    optim: OptimSection = field(default_factory=OptimSection)
    trainer: TrainerSection = field(default_factory=TrainerSection)
    calibrate: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        for target in self.calibrate:
            _checks.fraction("calibrate", target)
        if self.masking is not None and self.budget is None:
            raise _checks.train_needs("masking", "budget", "{target: 0.5}")

    @property
    def dynamic(self) -> bool:
        """Whether the network is trained under a budget."""
        return self.budget is not None

    def to_dict(self) -> dict[str, Any]:
        """Plain form for YAML and JSON; sections that are None are left out."""
        sections = {name: value for name, value in asdict(self).items() if value is not None}
        if self.budget is not None and self.budget.temperature is not None:
            sections["budget"]["temperature"] = [list(step) for step in self.budget.temperature]
        return sections
