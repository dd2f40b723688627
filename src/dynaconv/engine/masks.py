"""The pass that turns `shortcut + mask * branch` into sparse execution: which convolution computes which rows.

Source: DynConv, arXiv 1912.03203, section 3.3. Walking back from the masked convolution, each convolution of the
branch needs what the next one reads for its open rows.
"""

from __future__ import annotations

from typing import NamedTuple

from dynaconv.engine.fuse import already, can_take_residual, join_residual
from dynaconv.engine.ir import Graph, Node
from dynaconv.engine.merge import take_shortcut

# Operations of one row each, besides convolutions; and those that only lay rows out anew.
BY_ROW = ("mul", "add", "act", "slopes", "layer_norm")
_LAID_OUT = ("concat", "slice", "interleave")


def recognise_masks(graph: Graph) -> None:
    """Give a grid to every convolution that only has to compute open rows.

    A masked convolution gets `masked` (closed rows keep the shortcut); behind other ends of a branch, such as
    squeeze-excite, open rows are added to the shortcut by a step of their own. What comes before in the branch gets a
    grid of needed rows. A mask times something else stays a multiplication.
    """
    for node in list(graph.nodes):
        if node.op == "mul":
            _recognise(graph, node)
    graph.tidy()


def _recognise(graph: Graph, node: Node) -> None:
    users = graph.users()
    mask, branch = node.inputs["y"], node.x
    if not mask.is_grid:
        mask, branch = branch, mask
    if not mask.is_grid or branch.is_grid or mask.size[:2] != branch.size[:2] or branch.size[2] == 1:
        return
    add = users[node][0] if len(users[node]) == 1 else None
    if add is None or add.op != "add" or node.attrs["act"] != "none":
        return
    shortcut = add.inputs["y"] if add.x is node else add.x
    if shortcut is node or shortcut.size != branch.size:
        return
    if can_take_residual(branch, users):
        join_residual(graph, add, branch, shortcut)
        branch.inputs["grid"] = mask
        branch.attrs["masked"] = True
        wanted = {branch.x: [needed(graph, mask, branch)]}
        walk_back(graph, branch, wanted, users)
    else:
        add.op, add.inputs = "weighted_add", {"x": shortcut, "y": branch, "weight": mask}
        walk_back(graph, add, {branch: [mask]}, users)


def walk_back(graph: Graph, end: Node, wanted: dict[Node, list[Node]], users: dict[Node, list[Node]]) -> None:
    """Needed rows of the convolutions before `end`, where all readers of their results need the same ones.

    What treats every row by itself passes need on; a mean over open rows reads those. Rows that nobody computed hold
    anything, so a need never ends at something that would mix them into others.

    Args:
        wanted: the rows that `end` reads, by what it reads them of. users: of the graph as it was.
    """
    order = list(graph.nodes)
    for node in reversed(order[: order.index(end)]):
        if node.op == "mean" and "grid" in node.inputs:
            wanted.setdefault(node.x, []).append(node.inputs["grid"])
            continue
        needs = wanted.get(node, [])
        need = covering(needs) if needs and len(needs) == len(users[node]) else None
        if need is None:
            continue
        if node.op == "conv" and node.size[:2] != (1, 1) and not {"residual", "grid"} & set(node.inputs):
            node.inputs["grid"] = need
            wanted.setdefault(node.x, []).append(needed(graph, need, node))
        elif node.op in BY_ROW or node.op in _LAID_OUT:
            for source in node.inputs.values():
                if source.size[:2] == node.size[:2] and not source.is_grid:
                    wanted.setdefault(source, []).append(need)
            if node.op in BY_ROW:
                node.inputs["grid"] = need


def covering(needs: list[Node]) -> Node | None:
    """The grid among these that holds the rows of all of them, if there is one."""
    for need in needs:
        if all(need is other or _covers(need, other) for other in needs):
            return need
    return None


def _covers(wide: Node, narrow: Node) -> bool:
    """Two receptive fields of the same grid, one within the other."""
    a, b = _field(wide), _field(narrow)
    within = all(w[0] >= n[0] and w[1] >= n[1] for w, n in zip(a.reach, b.reach, strict=True))
    return a.solid and within and (a.origin, a.stride) == (b.origin, b.stride)


class _Field(NamedTuple):
    """What is needed for open positions of `origin`, `stride` apart.

    reach: along each axis, how far before and behind such a position it lies; solid: all in between is needed, too.
    """

    origin: Node
    stride: tuple[int, int]
    reach: list[tuple[int, int]]
    solid: bool


def _field(grid: Node) -> _Field:
    if grid.op != "dilate":
        return _Field(grid, (1, 1), [(0, 0), (0, 0)], True)
    source, stride = grid.inputs["grid"], grid.attrs["stride"]
    inner = _field(source) if stride == (1, 1) else _Field(source, stride, [(0, 0), (0, 0)], True)
    attrs = (grid.attrs[k] for k in ("kernel", "dilation", "padding"))
    reach = [
        (before + p, behind + d * (k - 1) - p)
        for (before, behind), k, d, p in zip(inner.reach, *attrs, strict=True)
    ]
    return _Field(inner.origin, inner.stride, reach, inner.solid and grid.attrs["dilation"] == (1, 1))


def partial_grid(node: Node) -> Node | None:
    """The grid of the rows that a node's value holds when it does not hold all of them."""
    if node.op == "expanded":
        return node.inputs.get("grid")
    if node.op == "conv":
        whole = "grid" not in node.inputs or node.attrs.get("masked") or "closed_act" in node.attrs
        return None if whole else node.inputs["grid"]
    return node.inputs.get("grid") if node.op in BY_ROW else None


def needed(graph: Graph, grid: Node, reader: Node) -> Node:
    """The grid of rows that `reader` reads for the open rows of `grid`."""
    attrs = {k: reader.attrs[k] for k in ("stride", "padding", "dilation")}
    attrs["kernel"] = tuple(reader.attrs["weight"].shape[2:])
    if attrs["kernel"] == attrs["stride"] == (1, 1) and attrs["padding"] == (0, 0):
        return grid
    h, w, _ = reader.x.size
    node = Node("dilate", {"grid": grid}, (h, w, 1), attrs, reader.layer)
    graph.insert_after(grid, node)
    return node


def _can_split(shortcut: Node, users: dict[Node, list[Node]]) -> bool:
    """A step can compute the closed rows of this shortcut, and another the open ones; depthwise ones walk all rows."""
    if not can_take_residual(shortcut, users) or shortcut.attrs["act"] != "none" or shortcut.is_mixed:
        return False
    return shortcut.attrs["groups"] == 1 or shortcut.attrs["weight"].shape[1] > 1


def place_shortcuts(graph: Graph) -> None:
    """Decide, after activations were fused, how the closed rows of masked convolutions get act(shortcut).

    "ready": the shortcut's value is the result there. "split": the shortcut's convolution computes closed rows with
    the activation and open rows without. "apart": it computes closed rows alone, since the masked convolution does its
    work along at open ones. "activate": a step of its own.
    """
    users = graph.users()
    for node in graph.nodes:
        if not node.attrs.get("masked"):
            continue
        shortcut, act = node.inputs["residual"], node.attrs["final_act"]
        if take_shortcut(node, shortcut, users):
            continue
        if act == "none" or already(shortcut, act):
            node.attrs["closed"] = "ready"
        elif _can_split(shortcut, users):
            node.attrs["closed"] = "split"
            shortcut.inputs["grid"] = node.inputs["grid"]
            shortcut.attrs["closed_act"] = act
        else:
            node.attrs["closed"] = "activate"
    graph.tidy()
