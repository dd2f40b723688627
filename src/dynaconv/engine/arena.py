"""Where values lie: liveness over the steps, then best fit into one arena."""

from __future__ import annotations

from dynaconv.engine.plan import Plan, Step, element_size

ALIGNMENT = 64


def place(plan: Plan) -> None:
    """Set every value's offset and the plan's `arena_bytes` (both for one image)."""
    lives = liveness(plan)
    sizes: dict[int, int] = {}
    for value in plan.values:
        if value.external < 0:
            size = value.height * value.width * value.stride * element_size(value.dtype)
            sizes[value.storage] = max(sizes.get(value.storage, 0), -(-size // ALIGNMENT) * ALIGNMENT)
    placed: dict[int, int] = {}
    # Large ones first: they are hardest to fit.
    for storage in sorted(sizes, key=lambda s: (-sizes[s], s)):
        if storage in lives:
            placed[storage] = _best_fit(storage, placed, sizes, lives)
    for value in plan.values:
        value.offset = placed.get(value.storage, 0) if value.external < 0 else 0
    plan.arena_bytes = max((placed[s] + sizes[s] for s in placed), default=0)


def liveness(plan: Plan) -> dict[int, tuple[int, int]]:
    """First and last step that touches each storage."""
    lives: dict[int, tuple[int, int]] = {}
    for i, step in enumerate(plan.steps):
        for index in touched(step):
            storage = plan.values[index].storage
            lives[storage] = (lives.get(storage, (i, i))[0], i)
    return lives


def touched(step: Step) -> list[int]:
    """Values that a step reads or writes."""
    return [v for v in (step.input, step.input2, step.out, *step.aux) if v >= 0]


def _best_fit(
    storage: int, placed: dict[int, int], sizes: dict[int, int], lives: dict[int, tuple[int, int]]
) -> int:
    """The offset of the smallest hole between storages that live at the same time."""
    first, last = lives[storage]
    taken = sorted(
        (offset, offset + sizes[other])
        for other, offset in placed.items()
        if lives[other][0] <= last and first <= lives[other][1]
    )
    best, room, end = None, None, 0
    for start, stop in taken:
        gap = start - end
        if gap >= sizes[storage] and (room is None or gap < room):
            best, room = end, gap
        end = max(end, stop)
    return end if best is None else best
