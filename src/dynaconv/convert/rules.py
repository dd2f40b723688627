"""Which config applies to which module: rules by name."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import nn

from dynaconv import _checks
from dynaconv.convert.configs import GateConfig, SpatialMasking

Rules = Mapping[str, "GateConfig | None"]


def config_for(name: str, rules: Rules) -> GateConfig | None:
    """The config for module `name`, or None.

    Precedence: the longest plain rule that is the name or one of its parents ("layer1" covers "layer1.0"); then the
    first `re:` rule, in order, that matches from the start of the name; then the rule "" (everything), if any.
    """
    plain = [r for r in rules if r and not r.startswith("re:") and (name == r or name.startswith(r + "."))]
    if plain:
        return rules[max(plain, key=len)]
    for rule, config in rules.items():
        if rule.startswith("re:") and re.match(rule[3:], name):
            return config
    return rules.get("")


def as_rules(config: GateConfig | Rules | None, model: nn.Module) -> Rules:
    """Normalise and check what `dynamize_` was given.

    Raises:
        TypeError: neither a config nor a mapping of names to configs.
        ValueError: a rule that matches no module, or a broken regular expression.
    """
    if config is None:
        config = SpatialMasking()
    if isinstance(config, GateConfig):
        return {"": config}
    if not isinstance(config, Mapping):
        raise TypeError(
            "expected a config such as SpatialMasking() or a dict of module names to configs, "
            f"got {type(config).__name__}"
        )
    names = [name for name, _ in model.named_modules()]
    for rule, value in config.items():
        if value is not None and not isinstance(value, GateConfig):
            raise TypeError(f"rule {rule!r} must map to a config or None, got {type(value).__name__}")
        _check_rule(rule, names)
    return config


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
