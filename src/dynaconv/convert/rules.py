"""Which config applies to which module: rules by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from dynaconv import _checks
from dynaconv.convert.configs import SpatialMasking
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.kernel_config import KernelConfig

Config = GateConfig | KernelConfig | tuple["GateConfig | KernelConfig", ...]
Rules = Mapping[str, "Config | None"]
_Kind = TypeVar("_Kind", GateConfig, KernelConfig)


def config_for(name: str, rules: Rules, kind: type[_Kind], default: object = None) -> _Kind | None:
    """The config of this kind for module `name`, or None; `default` where no rule speaks of it.

    Precedence: the longest plain rule that is the name or one of its parents ("layer1" covers "layer1.0"); then the
    first `re:` rule, in order, that matches from the start of the name; then the rule "" (everything), if any. A gate
    and a kernel config do not compete: each looks only at rules that speak of its kind, and at rules that say None.
    """
    own = {rule: _of_kind(value, kind) for rule, value in rules.items() if _speaks(value, kind)}
    plain = [r for r in own if r and not r.startswith("re:") and (name == r or name.startswith(r + "."))]
    if plain:
        return own[max(plain, key=len)]
    for rule, config in own.items():
        if rule.startswith("re:") and re.match(rule[3:], name):
            return config
    return own.get("", default)


def _of_kind(value: Config | None, kind: type[_Kind]) -> _Kind | None:
    values = value if isinstance(value, tuple) else (value,)
    return next((v for v in values if isinstance(v, kind)), None)


def _speaks(value: Config | None, kind: type[_Kind]) -> bool:
    return value is None or _of_kind(value, kind) is not None


def as_rules(config: Config | Rules | None, model: nn.Module) -> Rules:
    """Normalise and check what `dynamize_` was given.

    Raises:
        TypeError: neither a config, a tuple of configs nor a mapping of names to them.
        ValueError: a rule that matches no module, or a broken regular expression.
    """
    if config is None:
        config = SpatialMasking()
    if isinstance(config, list):
        config = tuple(config)
    if isinstance(config, GateConfig | KernelConfig | tuple):
        config = {"": config}
    if not isinstance(config, Mapping):
        raise TypeError(
            "expected a config such as SpatialMasking() or DYConv(), a tuple of them, or a dict of module names to "
            f"configs, got {type(config).__name__}"
        )
    names = [name for name, _ in model.named_modules()]
    rules = {rule: tuple(value) if isinstance(value, list) else value for rule, value in config.items()}
    for rule, value in rules.items():
        _check_value(rule, value)
        _check_rule(rule, names)
    return rules


def _check_value(rule: str, value: object) -> None:
    values = value if isinstance(value, tuple) else (value,)
    if value is not None and not (values and all(isinstance(v, GateConfig | KernelConfig) for v in values)):
        raise TypeError(f"rule {rule!r} must map to a config, a tuple of configs or None, got {value!r}")
    for kind in (GateConfig, KernelConfig):
        if sum(isinstance(v, kind) for v in values) > 1:
            raise ValueError(
                f"rule {rule!r} has two configs of one kind; a tuple takes one gate and one kernel config"
            )


def _check_rule(rule: str, names: list[str]) -> None:
    if rule.startswith("re:"):
        try:
            pattern = re.compile(rule[3:])
        except re.error as error:
            raise ValueError(f"rule {rule!r} is not a regular expression: {error}") from None
        if not any(pattern.match(name) for name in names):
            raise ValueError(f"rule {rule!r} matches no module; print(model) shows the names")
    elif rule not in names:
        raise _checks.unknown("module", rule, [n for n in names if n])
