"""The networks that a study compares: a static one, and versions of it with dynamic kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynaconv import _checks
from dynaconv.train.recipe import KernelsSection

STATIC = "static"
# Method -> the option of its config that a number behind the name sets (of the network, for the static one).
_NUMBERS = {
    STATIC: "width",
    "condconv": "num_experts",
    "dyconv": "num_kernels",
    "dynet": "group_size",
    "dcd": None,
    "odconv": "num_kernels",
    "weightnet": None,
}
METHODS = tuple(_NUMBERS)
TITLES = {
    "static": "static",
    "condconv": "CondConv",
    "dyconv": "DY-Conv",
    "dynet": "DyNet",
    "dcd": "DCD",
    "odconv": "ODConv",
    "weightnet": "WeightNet",
}


@dataclass(frozen=True)
class Method:
    """One version of the network: its name as asked for, its kind, the number behind it (experts, or a width)."""

    name: str
    kind: str
    number: int | None = None

    @property
    def title(self) -> str:
        """The name in print.

        >>> parse_method("odconv4").title
        'ODConv 4x'
        """
        number = "" if self.number is None else f" {self.number}x"
        return TITLES[self.kind] + (number if self.kind != STATIC else number.replace("x", " wide"))

    @property
    def width(self) -> int | None:
        """The width that a static network's name asks for, None elsewhere."""
        return self.number if self.kind == STATIC else None

    def kernels(self, anneal_epochs: float) -> KernelsSection | None:
        """The section of a training recipe that makes this version, None for the static network.

        Args:
            anneal_epochs: over which the temperature of attention falls from 30 to 1; 0 trains at 1.
        Raises:
            ValueError: the number is out of range.
        """
        if self.kind == STATIC:
            return None
        argument = _NUMBERS[self.kind]
        options = {argument: self.number} if argument and self.number is not None else {}
        annealed = {"anneal_epochs": anneal_epochs} if anneal_epochs > 0 else {"start_temperature": 1.0}
        return KernelsSection(self.kind, options, **annealed)


def parse_method(name: str) -> Method:
    """A method by name; condconv, dyconv, dynet and odconv take their number of experts behind it.

    static takes a width: a wider static network shows what the same parameters or MACs give without dynamic kernels.

    Raises:
        ValueError: an unknown name (the nearest are named).

    >>> parse_method("condconv4")
    Method(name='condconv4', kind='condconv', number=4)
    """
    match = re.fullmatch(r"([a-z]+?)(\d+)?", name)
    kind, digits = match.groups() if match else (name, None)
    numbered = _NUMBERS.get(kind) is not None
    if kind not in METHODS or (digits and not numbered):
        raise _checks.unknown("method", name, METHODS)
    return Method(name, kind, int(digits) if digits else None)


def parse_methods(names: list[str]) -> list[Method]:
    """Several methods, each once, in the order given.

    Raises:
        ValueError: an unknown name, or none at all.
    """
    methods = [parse_method(name) for name in dict.fromkeys(names)]
    if not methods:
        raise _checks.study_none_given("--methods", METHODS)
    return methods
