"""What the configs of all dynamic kernels have in common."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, ClassVar, NamedTuple

from torch import nn

from dynaconv import _checks
from dynaconv.nn.dynamic_conv import DynamicConv

SCOPES = ("paper", "all")
INITS = ("exact", "fresh")


class Place(NamedTuple):
    """What published rules ask of the surroundings: the family, and whether its blocks are bottlenecks."""

    family: str | None = None
    bottleneck: bool = False


class KernelConfig:
    """Base of the configs that turn convolutions into dynamic ones; a subclass is a frozen dataclass.

    Common options:
        scope: where the config is for the whole network: "paper" takes the layers that the method's paper makes dynamic
            (`dynaconv.convert.paper_sites`), "all" every convolution but the stem. Rules by name choose for themselves.
        init: "exact" (the converted network computes what the original did) or "fresh" (experts drawn anew, as the
            published networks start).
        execution: strategy of the layers, see `dynaconv.ops.dynamic_conv2d`.
        first_block, head, classifier: change the paper's choice, see `paper_sites`.
    """

    kind: ClassVar[str]
    layers: ClassVar[dict[type[nn.Module], type[DynamicConv]]]

    scope: str
    init: str
    execution: str
    first_block: str | int | None
    head: bool | None
    classifier: bool | None

    def __post_init__(self) -> None:
        _checks.one_of("scope", self.scope, SCOPES)
        _checks.one_of("init", self.init, INITS)
        _checks.one_of("execution", self.execution, self._executions())
        self.check()

    @staticmethod
    def _executions() -> Sequence[str]:
        from dynaconv.ops.dynamic_conv2d import EXECUTIONS

        return EXECUTIONS

    def check(self) -> None:
        """Raise for options that no layer could take."""

    @property
    def shares_router(self) -> bool:
        """One router serves all converted layers of a block."""
        return getattr(self, "routing", "layer") == "block"

    def convert_conv(self, conv: nn.Module, *, shared: bool, place: Place) -> DynamicConv:
        """The dynamic layer for a static convolution; `shared` leaves it without a router of its own."""
        raise TypeError(f"{type(self).__name__} must implement convert_conv")

    def convert_linear(self, linear: nn.Linear, place: Place) -> nn.Module:
        """The dynamic layer for a classifier.

        Raises:
            ValueError: the method has no such form.
        """
        raise ValueError(f"{type(self).__name__} has no form for a linear layer; leave the classifier static")

    def block_router(self, in_channels: int, layers: Sequence[DynamicConv], place: Place) -> nn.Module:
        """The router that a block's layers share."""
        raise TypeError(f"{type(self).__name__} must implement block_router")

    def layer_for(self, conv: nn.Module) -> type[DynamicConv]:
        """The layer class for this kind of convolution.

        Raises:
            TypeError: not a plain convolution.
        """
        if type(conv) not in self.layers:
            raise _checks.not_convertible(type(self).__name__, "Conv1d, Conv2d or Conv3d", conv)
        return self.layers[type(conv)]

    def describe(self) -> str:
        """A few words for the conversion report."""
        return self.kind

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `config_from_dict` reads it back."""
        return {"kind": self.kind, **asdict(self)}
