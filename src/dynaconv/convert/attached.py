"""What others have attached to modules, and would be lost in a conversion: hooks and parametrizations."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.utils import parametrize

from dynaconv import _checks

_HOOKS = {
    "_forward_hooks": "forward",
    "_forward_pre_hooks": "forward-pre",
    "_backward_hooks": "backward",
    "_backward_pre_hooks": "backward-pre",
}


def refuse_attached(model: nn.Module, converted: Iterable[str], skipped: Iterable[str] = ()) -> None:
    """Look at the modules that a conversion replaces, and at everything in them; hooks elsewhere go on working.

    Args:
        skipped: blocks that were asked for but not recognised, maybe because of a parametrization.
    Raises:
        ValueError: one of them has a hook or a parametrization.
    """
    converted = list(converted)
    for name in [*converted, *skipped]:
        for below, module in model.get_submodule(name).named_modules(prefix=name):
            if parametrize.is_parametrized(module):
                raise _checks.convert_parametrized(below, list(module.parametrizations))
            for attribute, kind in _HOOKS.items() if name in converted else ():
                if getattr(module, attribute):
                    raise _checks.convert_hooked(below, kind)
