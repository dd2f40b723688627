"""The networks that a study compares: a static one, and versions of it with dynamic kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from dynaconv import _checks

STATIC = "static"
# Method -> its config in dynaconv, and which of its arguments a number behind the name sets.
_CONFIGS = {
    "condconv": ("CondConv", "num_experts"),
    "dyconv": ("DYConv", "num_kernels"),
    "dynet": ("DyNetConv", "group_size"),
    "dcd": ("DCDConv", None),
    "odconv": ("ODConv", "num_kernels"),
    "weightnet": ("WeightNetConv", None),
}
METHODS = (STATIC, *_CONFIGS)
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
    """One version of the network: its name as asked for, its kind, the number of experts if one was given."""

    name: str
    kind: str
    number: int | None = None

    @property
    def title(self) -> str:
        """The name in print.

        >>> parse_method("odconv4").title
        'ODConv 4x'
        """
        return TITLES[self.kind] + (f" {self.number}x" if self.number else "")

    def config(self) -> Any:
        """The config for `dc.dynamize_` with the paper's own initialisation, None for the static network.

        Raises:
            ValueError: the number is out of range.
        """
        import dynaconv as dc

        if self.kind == STATIC:
            return None
        config, argument = _CONFIGS[self.kind]
        options = {argument: self.number} if self.number and argument else {}
        return getattr(dc, config)(init="fresh", **options)


def parse_method(name: str) -> Method:
    """A method by name; condconv, dyconv, dynet and odconv take their number of experts behind it.

    Raises:
        ValueError: an unknown name (the nearest are named).

    >>> parse_method("condconv4")
    Method(name='condconv4', kind='condconv', number=4)
    """
    match = re.fullmatch(r"([a-z]+?)(\d+)?", name)
    kind, digits = match.groups() if match else (name, None)
    numbered = kind in _CONFIGS and _CONFIGS[kind][1] is not None
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


def make_network(method: Method, base: str, options: dict[str, Any], seed: int) -> nn.Module:
    """The network `base` (a name of `dc.list_models()`), made dynamic where the method's paper does it.

    The static weights depend on the seed alone, so that all methods start from the same stem and shortcuts.
    """
    import dynaconv as dc
    from dynaconv.train.callbacks import seed_everything

    seed_everything(seed)
    model = dc.create_model(base, **options)
    config = method.config()
    if config is not None:
        dc.dynamize_(model, config)
    return model
