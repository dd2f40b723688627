"""One kernel per sample: every strategy against the definition, layouts and refusals."""

from __future__ import annotations

import inspect
import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynaconv.ops.dynamic_conv2d import (
    EXECUTIONS,
    api,
    choice,
    choose_execution,
    dynamic_conv2d,
    mix_kernels,
    per_sample_conv,
    reference,
    strategies,
)
from dynaconv.ops.dynamic_conv2d.geometry import ConvGeometry

TOLERANCE = 1e-5
STRATEGIES = EXECUTIONS[1:]
GROUPS = [(4, 6, 1), (4, 6, 2), (4, 4, 4), (4, 8, 4), (1, 3, 1), (3, 1, 1)]


def close(got: Tensor, want: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == want.shape
    error, scale = (got - want).detach().abs().max(), want.detach().abs().max()
    assert float(error) <= tolerance * max(1.0, float(scale))


def definition(parts: dict[str, Tensor | None], geometry: ConvGeometry) -> Tensor:
    """The reference, in double precision, with both biases."""
    made = {n: None if t is None else t.double() for n, t in parts.items()}
    y = reference.per_sample_conv(
        made["x"], reference.mix_kernels(made["weight"], made["routing"], made["taps"]), geometry
    )
    ones = (1,) * len(geometry.stride)
    mixed = reference.mix_biases(made["bias"], made["routing"])
    y = y if mixed is None else y + mixed.reshape(*mixed.shape, *ones)
    return y if made["static_bias"] is None else y + made["static_bias"].reshape(-1, *ones)


def run(parts: dict[str, Tensor | None], geometry: ConvGeometry, execution: str) -> Tensor:
    return dynamic_conv2d(
        parts["x"],
        parts["weight"],
        parts["routing"],
        parts["bias"],
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        geometry.groups,
        static_bias=parts["static_bias"],
        taps=parts["taps"],
        execution=execution,
    )


def gradients(
    parts: dict[str, Tensor | None], y: Tensor, generator: torch.Generator
) -> dict[str, Tensor | None]:
    v = torch.randn(y.shape, generator=generator).to(y.dtype)
    there = [n for n, t in parts.items() if t is not None]
    found = torch.autograd.grad((y * v).sum(), [parts[n] for n in there])
    return dict(zip(there, found, strict=True))


@st.composite
def problems(draw) -> tuple[dict[str, Tensor | None], ConvGeometry]:
    """Tensors and geometry with an output of at least one position, as ugly as they come."""
    dims = draw(st.sampled_from([1, 2, 2, 3]))

    def axes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    i, o, g = draw(st.sampled_from(GROUPS))
    kernel, size = axes(1, 3 if dims == 3 else 5), axes(1, 5 if dims == 3 else 11)
    geometry = ConvGeometry(axes(1, 3), axes(0, 2), axes(1, 2), g)
    assume(min(geometry.output_size(size, kernel)) >= 1)
    batch, experts = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2, 5]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 9)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).requires_grad_(True)

    by_channel, taps, bias, static = (draw(st.booleans()) for _ in range(4))
    return {
        "x": normal(batch, i, *size),
        "weight": normal(experts, o, i // g, *kernel),
        "routing": normal(batch, o, experts) if by_channel else normal(batch, experts),
        "taps": normal(batch, math.prod(kernel)) if taps else None,
        "bias": normal(experts, o) if bias else None,
        "static_bias": normal(o) if static else None,
    }, geometry


def able(parts: dict[str, Tensor | None], execution: str) -> bool:
    kernel = tuple(parts["weight"].shape[3:])
    taps = parts["taps"] is not None and math.prod(kernel) > 1
    facts = {"batch": parts["x"].shape[0], "kernel": kernel, "experts": parts["weight"].shape[0]}
    return execution == "auto" or choice.cannot_run(execution, **facts, taps=taps) is None


@settings(max_examples=100)
@given(problems())
def test_every_strategy_equals_the_definition(problem) -> None:
    parts, geometry = problem
    want = definition(parts, geometry)
    expected = gradients(parts, want, torch.Generator().manual_seed(1))
    for execution in EXECUTIONS:
        if not able(parts, execution):
            with pytest.raises(ValueError, match=f"execution='{execution}' cannot run here: "):
                run(parts, geometry, execution)
            continue
        y = run(parts, geometry, execution)
        close(y, want.float())
        got = gradients(parts, y, torch.Generator().manual_seed(1))
        for name, gradient in expected.items():
            close(got[name], gradient)
        with torch.no_grad():
            close(run(parts, geometry, execution), want.float())


@given(problems())
def test_given_kernels_are_applied_as_the_definition_says(problem) -> None:
    parts, geometry = problem
    x, kernels = parts["x"], mix_kernels(parts["weight"], parts["routing"]).detach().requires_grad_(True)
    bias = None if parts["bias"] is None else reference.mix_biases(parts["bias"], parts["routing"])
    bias = parts["static_bias"] if bias is None else bias.detach().requires_grad_(True)
    made = {"x": x, "weight": kernels, "bias": bias}
    want = reference.per_sample_conv(x.double(), kernels.double(), geometry)
    if bias is not None:
        rows = bias.double() if bias.dim() == 2 else bias.double().expand(x.shape[0], -1)
        want = want + rows.reshape(*rows.shape, *(1,) * len(geometry.stride))
    expected = gradients(made, want, torch.Generator().manual_seed(1))
    arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    for execution in ("auto", "grouped", "unfold", "bmm", "single"):
        if not able(parts, execution):
            continue
        y = per_sample_conv(x, kernels, bias, *arguments, execution=execution)
        close(y, want.float())
        got = gradients(made, y, torch.Generator().manual_seed(1))
        for name, gradient in expected.items():
            close(got[name], gradient)


def test_the_definition_is_the_sum_over_experts() -> None:
    """W(x) = sum of a_k(x) W_k, one output at a time, for a depthwise and a dense kernel."""
    generator = torch.Generator().manual_seed(0)
    for i, o, g in ((4, 6, 2), (4, 4, 4)):
        x = torch.randn(2, i, 5, 4, generator=generator)
        weight = torch.randn(3, o, i // g, 3, 2, generator=generator)
        routing = torch.rand(2, 3, generator=generator)
        taps = torch.rand(2, 6, generator=generator)
        got = mix_kernels(weight, routing, taps)
        for b in range(2):
            kernel = sum(float(routing[b, k]) * weight[k] for k in range(3)) * taps[b].reshape(3, 2)
            close(got[b], kernel)
            want = F.conv2d(x[b : b + 1], kernel, stride=(2, 1), padding=(1, 0), groups=g)
            made = dynamic_conv2d(x, weight, routing, None, (2, 1), (1, 0), groups=g, taps=taps)
            close(made[b : b + 1], want)
        rows = torch.rand(2, o, 3, generator=generator)
        for b, c in itertools.product(range(2), range(o)):
            want = sum(float(rows[b, c, k]) * weight[k, c] for k in range(3))
            close(mix_kernels(weight, rows)[b, c], want)


@pytest.mark.parametrize("execution", STRATEGIES)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("by_channel", [False, True])
def test_gradcheck(execution: str, dims: int, by_channel: bool, seed: int) -> None:
    batch = 1 if execution == "single" else 2
    kernel = (1,) * dims if execution == "bmm" else (2, 3, 2)[:dims]
    made = {"dtype": torch.float64, "requires_grad": True}
    x = torch.randn(batch, 2, *(4, 3, 2)[:dims], **made)
    weight, bias = torch.randn(2, 4, 1, *kernel, **made), torch.randn(2, 4, **made)
    routing = torch.randn(batch, 4, 2, **made) if by_channel else torch.randn(batch, 2, **made)
    taps = None if execution == "feature" else torch.randn(batch, math.prod(kernel), **made)
    static = torch.randn(4, **made)

    def function(*tensors: Tensor | None) -> Tensor:
        x, weight, routing, bias, static, taps = tensors
        return dynamic_conv2d(
            x, weight, routing, bias, 1, 1, 1, 2, static_bias=static, taps=taps, execution=execution
        )

    assert torch.autograd.gradcheck(function, (x, weight, routing, bias, static, taps))


def small(batch: int = 3, kernel: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 4, 7, 5, generator=generator)
    weight = torch.randn(2, 6, 4, kernel, kernel, generator=generator)
    return x, weight, torch.randn(batch, 2, generator=generator)


@pytest.mark.parametrize("execution", STRATEGIES)
@pytest.mark.parametrize("training", [False, True])
def test_memory_format_follows_the_input(execution: str, training: bool) -> None:
    x, weight, routing = small(1 if execution == "single" else 3, 1 if execution == "bmm" else 3)
    weight.requires_grad_(training)
    want = definition(dict.fromkeys(("taps", "bias", "static_bias")) | {"x": x, "weight": weight, "routing": routing},
                      ConvGeometry.of(2, 2, 1, 1, 1))  # fmt: skip
    last = x.contiguous(memory_format=torch.channels_last)
    y = dynamic_conv2d(last, weight, routing, stride=2, padding=1, execution=execution)
    assert y.is_contiguous(memory_format=torch.channels_last)
    close(y, want.float())
    strided = torch.randn(x.shape[0], 8, 5, 14)[:, ::2].transpose(2, 3)[:, :, ::2].copy_(x)
    assert not strided.is_contiguous() and not strided.is_contiguous(memory_format=torch.channels_last)
    close(dynamic_conv2d(strided, weight, routing, stride=2, padding=1, execution=execution), want.float())
    expanded = x[:1].expand(x.shape)
    many = dynamic_conv2d(
        expanded, weight, routing[:1].expand(routing.shape), None, 2, 1, execution=execution
    )
    for image in many:
        close(image, want[0].float())
    plain = dynamic_conv2d(x, weight, routing, stride=2, padding=1, execution=execution)
    assert plain.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("execution", STRATEGIES)
def test_precision_follows_the_input(execution: str, dtype: torch.dtype) -> None:
    x, weight, routing = small(1 if execution == "single" else 3, 1 if execution == "bmm" else 3)
    y = dynamic_conv2d(x.to(dtype), weight.to(dtype), routing, padding=1, execution=execution)
    assert y.dtype == dtype
    want = dynamic_conv2d(x, weight, routing, padding=1, execution="auto")
    close(y.float(), want, 0.03 if dtype == torch.bfloat16 else TOLERANCE)


@pytest.mark.parametrize("kernel", [1, 3])
def test_permuting_the_batch_permutes_the_output(kernel: int) -> None:
    x, weight, routing = small(3, kernel)
    order = torch.tensor([2, 0, 1])
    for execution in ("grouped", "feature", "unfold", *(("bmm",) if kernel == 1 else ())):
        y = dynamic_conv2d(x, weight, routing, padding=1, execution=execution)
        close(dynamic_conv2d(x[order], weight, routing[order], padding=1, execution=execution), y[order])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("execution", ["auto", "grouped", "feature", "unfold"])
def test_an_empty_batch_gives_an_empty_output(kernel: int, execution: str) -> None:
    x, weight, routing = small(3, kernel)
    weight.requires_grad_(True)
    for mode in (torch.enable_grad(), torch.no_grad()):
        with mode:
            y = dynamic_conv2d(x[:0], weight, routing[:0], stride=2, padding=kernel // 2, execution=execution)
            assert y.shape == (0, 6, 4, 3)
            kernels = mix_kernels(weight, routing)[:0]
            assert per_sample_conv(x[:0], kernels, padding=kernel // 2).shape == (0, 6, 7, 5)
    dynamic_conv2d(x[:0], weight, routing[:0], execution=execution).sum().backward()
    assert not bool(weight.grad.any())


@pytest.mark.parametrize("taps", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_large_kernels_are_mixed_in_chunks_with_the_same_result(taps: bool, groups: int, monkeypatch) -> None:
    x, _, routing = small()
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 6, 4 // groups, 3, 3, generator=generator)
    given = torch.rand(3, 9, generator=generator) if taps else None
    arguments = (x, weight, routing, None, 2, 1, 1, groups)
    calls = []
    plain_mix = strategies.mix_kernels
    monkeypatch.setattr(strategies, "mix_kernels", lambda *a: calls.append(a) or plain_mix(*a))
    whole = dynamic_conv2d(*arguments, taps=given, execution="grouped")
    at_once = len(calls)
    calls.clear()
    monkeypatch.setattr(strategies, "CHUNK_BYTES", 1)
    chunked = dynamic_conv2d(*arguments, taps=given, execution="grouped")
    assert len(calls) == 3 > at_once
    close(chunked, whole)
    parts = {"x": x, "weight": weight, "routing": routing, "taps": given, "bias": None, "static_bias": None}
    close(chunked, definition(parts, ConvGeometry.of(2, 2, 1, 1, groups)).float())


REASONS = [
    ("bmm", {}, "it needs a kernel of one tap, this one is 3x3", "grouped, feature, unfold or auto"),
    ("single", {}, "it needs a batch of 1, this one has 3", "grouped, feature, unfold or auto"),
    ("single", {"kernel": 1}, "it needs a batch of 1", "grouped, feature, unfold, bmm or auto"),
    ("feature", {"taps": True}, "the attention scales single taps", "grouped, unfold or auto"),
]


@pytest.mark.parametrize(("execution", "changes", "reason", "able"), REASONS)
def test_a_strategy_that_cannot_run_says_why_and_which_can(execution, changes, reason, able) -> None:
    x, weight, routing = small(3, changes.get("kernel", 3))
    taps = torch.ones(3, 9) if changes.get("taps") else None
    with pytest.raises(ValueError) as caught:
        dynamic_conv2d(x, weight, routing, execution=execution, taps=taps)
    text = str(caught.value)
    assert text.startswith(f"execution='{execution}' cannot run here: {reason}") and text.endswith(
        f"use {able}"
    )
    for other in able.removesuffix(" or auto").split(", "):
        dynamic_conv2d(x, weight, routing, execution=other, taps=taps)


def test_given_kernels_have_no_features_to_mix() -> None:
    x, weight, _ = small(2)
    with pytest.raises(
        ValueError, match=r"computes its kernel without a mixture; use grouped, unfold or auto"
    ):
        per_sample_conv(x, weight, execution="feature")


def test_bad_input() -> None:
    x, weight, routing = small()
    for arguments, message in [
        ({"execution": "winograd"}, r"unknown execution 'winograd'; known: auto, bmm, feature"),
        ({"execution": "group"}, r"unknown execution 'group'; did you mean 'grouped'"),
        ({"routing": routing[:, :1]}, r"routing must be \[B, K\] = \[3, 2\].*got \[3, 1\]"),
        ({"routing": routing[:2]}, r"routing must be \[B, K\] = \[3, 2\].*got \[2, 2\]"),
        ({"routing": torch.ones(3, 5, 2)}, r"\[B, O, K\] = \[3, 6, 2\], got \[3, 5, 2\]"),
        ({"routing": torch.ones(3)}, r"routing must be .*got \[3\]"),
        ({"x": x[0]}, r"expects x \[B, 4, H, W\], got \[4, 7, 5\]"),
        ({"x": x[:, :3]}, r"expects x \[B, 4, H, W\], got \[3, 3, 7, 5\]"),
        ({"weight": weight[0]}, r"expects x \[B, 3, L\], got \[3, 4, 7, 5\]"),
        ({"weight": weight[:, 0, 0]}, r"experts must be \[K, O, I/g, \*kernel\]"),
        ({"weight": weight[:, :5, :2], "groups": 2}, r"output channels must be divisible by groups, got 5"),
    ]:
        with pytest.raises(ValueError, match=message):
            dynamic_conv2d(**{"x": x, "weight": weight, "routing": routing, **arguments})
    with pytest.raises(ValueError, match=r"kernels must be .* with B = 3 as in x, got \[2, 6, 4, 3, 3\]"):
        per_sample_conv(x, weight)
    with pytest.raises(ValueError, match=r"per_sample_conv expects x \[B, 4, H, W\], got \[2, 3, 7, 5\]"):
        per_sample_conv(x[:2, :3], weight)


def test_the_choice_depends_on_shapes_only(monkeypatch) -> None:
    kinds = {p.name: p.annotation for p in inspect.signature(choose_execution).parameters.values()}
    assert not any("Tensor" in str(kind) for kind in kinds.values())
    seen = []

    def record(execution: str, **facts) -> str:
        seen.append((facts, choose_execution(execution, **facts)))
        return seen[-1][1]

    monkeypatch.setattr(api, "choose_execution", record)
    x, weight, routing = small()
    for data in (x, x * 0, x * torch.nan, x * 1e30):
        dynamic_conv2d(data, weight, routing)
        dynamic_conv2d(data, weight * 0, torch.softmax(routing * 1e3, 1))
    assert all(entry == seen[0] for entry in seen)
    facts = json.loads(json.dumps(seen[0][0]))
    assert (facts["batch"], facts["weight_shape"], facts["positions"]) == (3, [6, 4, 3, 3], 15)
    assert (facts["groups"], facts["experts"], facts["taps"], facts["training"]) == (1, 2, False, False)


def test_one_image_runs_as_a_plain_convolution(monkeypatch) -> None:
    x, weight, routing = small(1)
    chosen = []
    plain = strategies.MIXED["single"]
    monkeypatch.setitem(strategies.MIXED, "single", lambda *a: chosen.append("single") or plain(*a))
    dynamic_conv2d(x, weight, routing)
    assert chosen == ["single"]


def test_autocast_mixes_in_full_precision() -> None:
    x, weight, routing = small()
    with torch.autocast("cpu", torch.bfloat16):
        kernels = mix_kernels(weight, routing)
        y = dynamic_conv2d(x, weight, routing, padding=1)
    assert kernels.dtype == torch.float32 and torch.equal(kernels, mix_kernels(weight, routing))
    assert y.dtype == torch.bfloat16
    close(y.float(), dynamic_conv2d(x, weight, routing, padding=1), 0.03)
