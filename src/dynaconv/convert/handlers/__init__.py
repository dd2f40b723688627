"""Blocks whose anatomy cannot be read from their forward, and the one entry to all recognition.

Residual blocks are recognised by their structure. For a forward that cannot be traced there are two ways:

* the block itself has a method `masked_anatomy() -> Anatomy`;
* a `handler(block) -> Anatomy | Refusal | None` for somebody else's class is added to `HANDLERS`.
"""

from collections.abc import Callable

from torch import nn

from dynaconv.convert.anatomy import Refusal, Verdict, outweighs
from dynaconv.convert.handlers._checks_of_steps import check_steps
from dynaconv.convert.structure import read_block
from dynaconv.nn.dynamic_conv import DynamicLayer
from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import Anatomy
from dynaconv.nn.routed_block import RoutedBlock

NO_SHORTCUT = "no shortcut (stride or channels change), so nothing could pass where the mask is closed"
HANDLERS: list[Callable[[nn.Module], Verdict]] = []


def recognise(block: nn.Module) -> Verdict:
    """Anatomy of a residual block, why it cannot be masked, or None when the module is none."""
    if isinstance(block, RoutedBlock):
        block = block.block
    own = getattr(block, "masked_anatomy", None)
    if callable(own):
        return check_steps(block, own())
    verdict = next((v for v in (handler(block) for handler in HANDLERS) if v is not None), None)
    return read_block(block) if verdict is None else verdict


def find_blocks(
    model: nn.Module, wanted: Callable[[str, Anatomy], bool] | None = None
) -> dict[str, Anatomy | Refusal]:
    """Verdicts by name, in forward order of registration; of blocks inside blocks the innermost.

    A block that runs others before a branch of its own with more work stands for them, and one whose inner blocks are
    not `wanted` for all that is in it, where it is wanted itself.
    A module of a recognised block's class whose forward adds nothing is one without a shortcut.
    """

    def maskable(name: str, verdict: Verdict) -> bool:
        return isinstance(verdict, Anatomy) and (wanted is None or wanted(name, verdict))

    found: dict[str, Anatomy | Refusal] = {}
    known: dict[tuple, Verdict] = {}
    modules = [(name, m) for name, m in model.named_modules() if name]
    hidden = [name for name, m in modules if isinstance(m, (DynamicLayer, Gate))]
    routed = {f"{name}.block" for name, m in modules if isinstance(m, RoutedBlock)}
    for name, module in reversed(modules):
        inner = [n for n in found if n.startswith(f"{name}.")]
        seen = name in routed or any(name == h or name.startswith(f"{h}.") for h in hidden)
        if seen:
            continue
        key = _likeness(module)
        verdict = known[key] if key in known else recognise(module)
        known[key] = verdict
        blocks = [n for n in inner if isinstance(found[n], Anatomy)]
        masked = [n.removeprefix(f"{name}.") for n in blocks if maskable(n, found[n])]
        stands = maskable(name, verdict) and (not masked or outweighs(verdict, masked))
        if blocks and not stands:
            continue
        if isinstance(verdict, Refusal) and any(found[n].kind != "untraceable" for n in inner):
            continue
        if verdict is not None:
            for n in inner:
                del found[n]
            found[name] = verdict
    kinds = {_class(model.get_submodule(n)): v.kind for n, v in found.items() if isinstance(v, Anatomy)}
    masked = [f"{n}." for n, v in found.items() if isinstance(v, Anatomy)]
    for name, module in modules:
        inside = name in routed or any(name.startswith(n) for n in masked)
        if name not in found and _class(module) in kinds and not inside:
            found[name] = Refusal(kinds[_class(module)], NO_SHORTCUT)
    return {name: found[name] for name, _ in modules if name in found}


def _likeness(block: nn.Module) -> tuple:
    """Equal for blocks that compute alike: a network repeats its blocks, and reading one takes a while."""
    parts = []
    for name, module in block.named_modules():
        own = tuple(
            (key, value if isinstance(value, (bool, int, float, str, type(None))) else id(value))
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "training"
        )
        shapes = tuple((key, tuple(t.shape)) for key, t in (*module._parameters.items(), *module._buffers.items())
                       if t is not None)  # fmt: skip
        parts.append((name, type(module), module.extra_repr(), own, shapes))
    return tuple(parts)


def _class(module: nn.Module) -> type[nn.Module]:
    return type(module.block if isinstance(module, RoutedBlock) else module)


__all__ = ["HANDLERS", "Refusal", "Verdict", "find_blocks", "recognise"]
