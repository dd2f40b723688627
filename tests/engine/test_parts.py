"""Packing, the arena, the mirrored structures, and making exported graphs functional."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.networks import NETWORKS, SIZE, Lambda, network
from torch import nn

import dynaconv as dc
from dynaconv.convert import SpatialMasking
from dynaconv.engine import arena, pack, structures
from dynaconv.engine.compiler import make_plan
from dynaconv.engine.export import functionalise
from dynaconv.engine.plan import ACTIVATIONS, KINDS, Conv, Plan, Step, Value

HEADER = (Path(__file__).parents[2] / "csrc" / "plan" / "plan.h").read_text()


@given(
    out=st.integers(1, 70),
    inner=st.integers(1, 5),
    groups=st.integers(1, 3),
    kernel=st.sampled_from([(1, 1), (3, 2), (3, 3)]),
    form=st.sampled_from(["conv", "depthwise"]),
)
def test_packing_is_reversible(out: int, inner: int, groups: int, kernel: tuple[int, int], form: str) -> None:
    generator = torch.Generator().manual_seed(out)
    if form == "depthwise":
        groups, inner, channels = out, 1, out
    else:
        groups = groups if form == "conv" else 1
        channels = out * groups
    weight = torch.randn(channels, inner, *kernel, generator=generator)
    bias = torch.randn(channels, generator=generator)
    function = {"depthwise": pack.pack_depthwise}.get(form)
    packed = function(weight, bias) if function else pack.pack_conv(weight, bias, groups)
    conv = Conv(form, inner * groups, channels, groups, kernel, weight=packed[0], bias=packed[1])
    again = pack.unpack(conv)
    assert torch.equal(again[0], weight) and torch.equal(again[1], bias)
    if form == "conv":
        assert packed[0].shape == (groups, -(-out // 32), kernel[0] * kernel[1] * inner, 32)


def test_winograd_weights_give_the_convolution() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(40, 5, 3, 3), torch.randn(5, 4, 4)
    points = pack.pack_winograd(weight).permute(1, 2, 0, 3).reshape(16, 5, 64)[:, :, :40].reshape(4, 4, 5, 40)
    b = torch.tensor([[1.0, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]])
    a = torch.tensor([[1.0, 1, 1, 0], [0, 1, -1, -1]])
    transformed = torch.einsum("ai,cij,bj->abc", b, x, b)
    products = torch.einsum("abc,abco->abo", transformed, points)
    y = torch.einsum("ia,abo,jb->oij", a, products, a)
    torch.testing.assert_close(y, F.conv2d(x[None], weight)[0], rtol=1e-4, atol=1e-4)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 40)), min_size=1, max_size=12))
def test_values_that_live_together_lie_apart(spans: list[tuple[int, int, int]]) -> None:
    plan = Plan(values=[Value(1, 1, size * 16, size * 16, i) for i, (_, _, size) in enumerate(spans)])
    for moment in range(10):
        for i, (a, b, _) in enumerate(spans):
            if moment in (min(a, b), max(a, b)):
                plan.steps.append(Step("activate", input=i, out=i))
    arena.place(plan)
    _assert_apart(plan)
    assert plan.arena_bytes <= sum(v.stride * 4 for v in plan.values)


def _assert_apart(plan: Plan) -> None:
    lives = arena.liveness(plan)
    inner = [v for v in plan.values if v.external < 0 and v.storage in lives]
    for i, a in enumerate(inner):
        assert a.offset % 64 == 0 and a.offset + a.height * a.width * a.stride * 4 <= plan.arena_bytes
        for b in inner[:i]:
            (a0, a1), (b0, b1) = lives[a.storage], lives[b.storage]
            if a.storage == b.storage or a1 < b0 or b1 < a0:
                continue
            sizes = [v.height * v.width * v.stride * 4 for v in (a, b)]
            assert a.offset + sizes[0] <= b.offset or b.offset + sizes[1] <= a.offset


@pytest.mark.parametrize("name", NETWORKS)
def test_plans_place_values_apart(name: str) -> None:
    _assert_apart(make_plan(network(name), (torch.randn(1, *SIZE),))[0])


def test_rows_that_would_share_cache_sets_are_spread() -> None:
    model = nn.Sequential(nn.Conv2d(3, 1024, 1), nn.Conv2d(1024, 8, 1)).eval()
    plan, _ = make_plan(model, (torch.randn(1, 3, 2, 2),))
    assert [v.stride for v in plan.values if v.channels == 1024] == [1040]


def test_structures_mirror_the_header() -> None:
    for kind, size in structures.SIZES.items():
        assert ctypes.sizeof(kind) == size
        body = re.search(rf"struct {kind.__name__} {{(.*?)^}};", HEADER, re.S | re.M).group(1)
        code = re.sub(r"//.*", "", body)
        names = [
            n for line in code.split(";") for n in re.findall(r"(\w+)(?:\[\d\])?(?=\s*(?:,|$))", line.strip())
        ]
        renamed = {"in": "input", "in2": "input2"}
        assert [renamed.get(n, n) for n in names] == [field[0] for field in kind._fields_]


def test_enumerations_mirror_the_header() -> None:
    def members(name: str) -> list[str]:
        body = re.search(rf"enum {name} : int32_t {{(.*?)}};", HEADER, re.S).group(1)
        return re.findall(r"\bk(\w+)", re.sub(r"//.*", "", body))

    assert [m.lower() for m in members("Activation")[:-1]] == [a.replace("_", "") for a in ACTIVATIONS]
    assert [m.lower() for m in members("Kind")[:-1]] == [k.replace("_", "") for k in KINDS]
    assert re.search(r"kPlanAbi = (\d+)", HEADER).group(1) == str(structures.PLAN_ABI)


def _exported(function) -> torch.fx.Graph:
    return torch.export.export(Lambda(function), (torch.randn(2, 4),), strict=False).graph


def test_writing_in_place_becomes_functional() -> None:
    graph = _exported(lambda m, x: (x + 1).relu_().add_(x))
    assert functionalise(graph)
    assert not any(getattr(n.target, "_schema", None) and n.target._schema.is_mutable for n in graph.nodes)


def test_writing_into_shared_memory_is_not_taken_apart_by_hand() -> None:
    def write(m, x):
        y = x + 1
        y[:, :2].relu_()
        return y * 2

    assert not functionalise(_exported(write))


def test_later_readers_see_what_was_written() -> None:
    def write(m, x):
        y = x + 1
        z = y * 2
        y.relu_()
        return z + y

    model = Lambda(write).eval()
    fast = dc.compile(model, (x := torch.randn(2, 4, 5, 5),), backend="eager")
    torch.testing.assert_close(fast(x), model(x))


def test_need_of_strided_and_dilated_branches() -> None:
    model = dc.create_model("resnet8_cifar")
    dc.dynamize_(model, SpatialMasking())
    plan, _ = make_plan(model.eval(), (torch.randn(1, 3, 32, 32),))
    dilations = [s for s in plan.steps if s.kind == "dilate"]
    assert len(dilations) == 3
    for step in dilations:
        conv, source, target = plan.convs[step.conv[0]], plan.grids[step.grid], plan.grids[step.grid2]
        assert conv.kernel == (3, 3) and (source.height, target.height) in ((32, 32), (16, 16), (8, 8))
