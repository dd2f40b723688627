"""Skipping equals the masked dense computation on every supported block."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.convert.networks import randomise_norms, small_block
from torch import nn

import dynaconv as dc
from dynaconv.convert import masked_blocks
from dynaconv.nn import MaskedBlock
from dynaconv.ops import _native
from dynaconv.testing import random_mask

KINDS = [
    "basic",
    "basic_s2",
    "bottleneck",
    "bottleneck_s2",
    "bottleneck_groups",
    "timm_basic",
    "inverted",
    "timm_inverted",
]
TOLERANCE = 1e-4


@pytest.fixture(autouse=True, params=["kernels", "operations"])
def executor(request, monkeypatch) -> str:
    """Every test runs with the compiled kernels and with PyTorch operations alone."""
    if request.param == "kernels" and _native.missing() is not None:
        pytest.skip(_native.missing())
    if request.param == "operations":
        monkeypatch.setattr(_native, "load", lambda: (None, "switched off by the test"))
    return request.param


def fixed_gate(block: MaskedBlock, mask: torch.Tensor) -> None:
    block.gate.register_forward_hook(lambda *_: mask)


def deviation(got: torch.Tensor, want: torch.Tensor) -> float:
    assert got.shape == want.shape and bool(got.isfinite().all())
    got, want = got.detach(), want.detach()
    return float((got - want).abs().max() / want.abs().max().clamp(min=1e-6))


@pytest.mark.needs("timm", "torchvision")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (5, 4)])
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
def test_skipping_equals_the_masked_dense_computation(
    kind, size, batch: int, density: float, seed: int
) -> None:
    block = small_block(kind).eval()
    x = torch.randn(batch, block.convs[0].in_channels, *size)
    mask = random_mask(batch, block.gate.grid(size), density, seed=batch)
    fixed_gate(block, mask)
    block.break_even = 2.0
    want = block.dense_forward(x, mask)
    with torch.no_grad():
        assert deviation(block(x), want) < TOLERANCE
        block.break_even = 0.0
        assert deviation(block(x), want) < TOLERANCE
    block.break_even = 2.0
    assert deviation(block(x.requires_grad_(True)), want) < TOLERANCE


@pytest.mark.needs("torchvision")
@pytest.mark.parametrize("kind", ["basic_s2", "bottleneck_s2", "inverted"])
def test_gradients_of_skipping_equal_the_dense_ones(kind: str, seed: int) -> None:
    block = small_block(kind).eval()
    x = torch.randn(2, block.convs[0].in_channels, 6, 7)
    mask = random_mask(2, block.gate.grid((6, 7)), 0.4)
    fixed_gate(block, mask)
    block.break_even = 2.0
    results = []
    for forward in (block, lambda v: block.dense_forward(v, mask)):
        block.zero_grad()
        leaf = x.clone().requires_grad_(True)
        (forward(leaf) ** 2).sum().backward()
        named = {n: p.grad.clone() for n, p in block.block.named_parameters()}
        results.append({"x": leaf.grad, **named})
    for name, want in results[1].items():
        assert deviation(results[0][name], want) < 1e-4, name


@pytest.mark.parametrize("kind", ["basic", "bottleneck_s2"])
def test_nothing_outside_the_dilated_mask_is_read(kind: str) -> None:
    block = small_block(kind).eval()
    mask = torch.zeros(1, 1, *block.gate.grid((12, 12)))
    mask[..., 2, 2] = 1
    fixed_gate(block, mask)
    block.break_even = 2.0
    x = torch.randn(1, block.convs[0].in_channels, 12, 12)
    with torch.no_grad():
        clean = block(x)[..., 2, 2]
        x[..., 9:, :] = float("nan")
        assert torch.equal(block(x)[..., 2, 2], clean)


def test_an_empty_mask_passes_the_shortcut_and_a_full_one_is_the_block(seed: int) -> None:
    block = small_block("basic_s2").eval()
    x = torch.randn(2, block.convs[0].in_channels, 8, 8)
    with torch.no_grad():
        block.gate.threshold.fill_(float("inf"))
        shortcut = torch.relu(block.block.downsample(x))
        assert deviation(block(x), shortcut) < 1e-6
        block.gate.threshold.fill_(float("-inf"))
        assert deviation(block(x), block.block(x)) < 1e-5


def test_training_computes_densely_and_moves_batch_norm_over_all_positions(seed: int) -> None:
    block = small_block("basic").train()
    plain = copy.deepcopy(block.block)
    x = torch.randn(4, block.convs[0].in_channels, 8, 8)
    fixed_gate(block, torch.zeros(4, 1, 8, 8))
    block(x)
    plain(x)
    for got, want in zip(block.block.buffers(), plain.buffers(), strict=True):
        assert torch.equal(got, want)


def test_folded_weights_follow_the_parameters(seed: int) -> None:
    block = small_block("basic").eval()
    x = torch.randn(1, block.convs[0].in_channels, 6, 6)
    fixed_gate(block, torch.ones(1, 1, 6, 6))
    block.break_even = 2.0
    with torch.no_grad():
        before = block(x)
        block.block.conv1.weight.mul_(2)
        assert deviation(block(x), block.dense_forward(x, torch.ones(1, 1, 6, 6))) < TOLERANCE
        assert not torch.equal(block(x), before)
        block.block.bn1.running_mean.add_(1)
        assert deviation(block(x), block.dense_forward(x, torch.ones(1, 1, 6, 6))) < TOLERANCE


def test_the_input_is_left_alone(seed: int) -> None:
    block = small_block("basic").eval()
    x = torch.randn(1, block.convs[0].in_channels, 6, 6)
    copied = x.clone()
    with torch.no_grad():
        block(x)
    assert torch.equal(x, copied)


def test_deepcopy_and_state_dict_hold_all_state(seed: int) -> None:
    model = dc.create_model("dynconv_resnet8_cifar").eval()
    x = torch.randn(2, 3, 32, 32)
    for block in masked_blocks(model).values():
        block.gate.threshold.fill_(1.5)
    with torch.no_grad():
        y = model(x)
        assert torch.equal(copy.deepcopy(model)(x), y)
        other = dc.create_model("dynconv_resnet8_cifar").eval()
        other.load_state_dict(model.state_dict())
        assert torch.equal(other(x), y)


def test_an_explicit_backend_never_falls_back(seed: int) -> None:
    block = small_block("basic").eval()
    block.backend = "cpu"
    x = torch.randn(1, block.convs[0].in_channels, 6, 6)
    with (
        torch.no_grad(),
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(RuntimeError, match="autocast is on"),
    ):
        block(x)


def test_wrong_channels_and_wrong_mask_are_told(seed: int) -> None:
    block = small_block("basic").eval()
    with pytest.raises(ValueError, match=r"MaskedBlock expects x \[N, 8, H, W\], got \[1, 5, 6, 6\]"):
        block(torch.randn(1, 5, 6, 6))
    fixed_gate(block, torch.ones(1, 1, 3, 3))
    with pytest.raises(ValueError, match="mask must be"):
        block(torch.randn(1, 8, 6, 6))


def test_mixed_precision_training_step(seed: int) -> None:
    model = dc.create_model("dynconv_resnet8_cifar")
    budget = dc.MacBudget(model, 0.5, total_steps=2)
    with torch.autocast("cpu", torch.bfloat16), budget.observe() as cost:
        loss = model(torch.randn(2, 3, 32, 32)).float().sum()
    (loss + cost.loss).backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_training_graph_compiles_as_one(seed: int) -> None:
    model = dc.create_model("dynconv_resnet8_cifar")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert compiled(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    randomise_norms(model)
    model.eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(
            torch.compile(model, fullgraph=True, backend="eager")(x), model(x), rtol=1e-4, atol=1e-4
        )


def test_unusual_norms_are_refused() -> None:
    model = dc.create_model("resnet8_cifar")
    model.layer1[0].bn1 = nn.BatchNorm2d(16, track_running_stats=False)
    report = dc.dynamize_(model)
    assert "layer1.0" in report.skipped and len(report.converted) == 2
