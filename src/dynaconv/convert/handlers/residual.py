"""BasicBlock and Bottleneck as written in torchvision, timm and our CIFAR networks."""

from __future__ import annotations

from torch import nn

from dynaconv.convert.handlers._common import Refusal, Verdict, check_steps, obstacle, present
from dynaconv.nn.dynamic_conv import DynamicConv
from dynaconv.nn.masked_block import Anatomy, Step

_OBSTACLES = ("drop_block", "aa", "se", "attn", "attn_last", "drop_path", "drop")


def residual_block(block: nn.Module) -> Verdict:
    """Recognise `conv1 bn1 [conv2 bn2 [conv3 bn3]]` with an optional `downsample` and a ReLU after the addition."""
    convs = [
        f"conv{i}" for i in (1, 2, 3) if isinstance(getattr(block, f"conv{i}", None), nn.Conv2d | DynamicConv)
    ]
    if len(convs) < 2 or convs != [f"conv{i + 1}" for i in range(len(convs))] or not present(block, "bn1"):
        return None
    kind = "bottleneck" if len(convs) == 3 else "basic"
    reason = obstacle(block, _OBSTACLES)
    if reason is not None:
        return Refusal(kind, reason)
    shortcut = next((n for n in ("downsample", "shortcut") if present(block, n)), None)
    first: nn.Conv2d = block.conv1
    last: nn.Conv2d = getattr(block, convs[-1])
    strided = any(tuple(getattr(block, name).stride) != (1, 1) for name in convs)
    if shortcut is None and (strided or first.in_channels != last.out_channels):
        return Refusal(kind, "its shortcut changes shape without a projection module")
    steps, final = _activations(block, convs)
    if final is None:
        return Refusal(kind, "no activation module after the addition (relu, act, act2, act3) was found")
    return check_steps(block, Anatomy(kind, steps, shortcut, final))


def _activations(block: nn.Module, convs: list[str]) -> tuple[tuple[Step, ...], str | None]:
    """One shared `relu`/`act` (torchvision) or numbered `act1..3` (timm)."""
    shared = next((n for n in ("relu", "act") if present(block, n)), None)
    steps = []
    for i, conv in enumerate(convs, start=1):
        act = shared or (f"act{i}" if present(block, f"act{i}") else None)
        steps.append(Step(conv, f"bn{i}", act if i < len(convs) else None))
    final = shared or (f"act{len(convs)}" if present(block, f"act{len(convs)}") else None)
    return tuple(steps), final
