"""The compiled kernels: right on every instruction set, gone without harm when they are missing."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dynaconv.nn import MaskUnit
from dynaconv.ops import ConvSpec, PackedBranch, _native, masked_residual
from dynaconv.testing import random_mask

needs_kernels = pytest.mark.skipif(_native.missing() is not None, reason=str(_native.missing()))

CHECK = """
import sys, torch
from dynaconv.ops import ConvSpec, PackedBranch, _native, masked_residual
from dynaconv.testing import random_mask
library, isa = _native.load()
assert isa == sys.argv[1], isa
torch.manual_seed(0)
for cin, mid, cout, size, stride in ((5, 33, 7, (9, 7), 1), (16, 40, 64, (12, 13), 2), (3, 1, 31, (1, 5), 1)):
    convs = [
        ConvSpec(torch.randn(mid, cin, 3, 3), torch.randn(mid), (stride,) * 2, (1, 1), (1, 1), 1, "relu"),
        ConvSpec(torch.randn(cout, mid, 3, 3), None, (1, 1), (1, 1), (1, 1), 1),
    ]
    x = torch.randn(3, cin, *size)
    out = tuple((s - 1) // stride + 1 for s in size)
    shortcut, mask = torch.randn(3, cout, *out), random_mask(3, out, 0.4)
    branch = PackedBranch.of(convs, "relu6")
    assert branch.native is not None
    got = masked_residual(x, mask, shortcut, branch, backend="cpu", break_even=2.0)
    want = masked_residual(x, mask, shortcut, branch, backend="eager")
    assert float((got - want).abs().max()) < 1e-4 * float(want.abs().max()), (got - want).abs().max()
"""


@needs_kernels
@pytest.mark.parametrize("isa", ["plain", "avx2", "avx512"])
def test_every_instruction_set(isa: str) -> None:
    capability = torch.backends.cpu.get_cpu_capability()
    if (isa == "avx512" and capability != "AVX512") or (
        isa == "avx2" and capability not in ("AVX2", "AVX512")
    ):
        pytest.skip(f"this processor has {capability}")
    environment = {**os.environ, "DYNACONV_ISA": isa}
    done = subprocess.run([sys.executable, "-c", CHECK, isa], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_kernels
@pytest.mark.parametrize("activation", _native.ACTIVATIONS)
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(1, 1, 1), (1, 2, 1), (3, 1, 2), (5, 2, 1), (2, 1, 1)]
)
@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
def test_one_convolution(
    activation: str, kernel: int, stride: int, dilation: int, density: float, seed: int
) -> None:
    padding = dilation * (kernel // 2)
    weight, bias = torch.randn(10, 6, kernel, kernel), torch.randn(10)
    conv = ConvSpec(weight, bias, (stride,) * 2, (padding,) * 2, (dilation,) * 2, 1, activation)
    x = torch.randn(2, 6, 8, 11)
    out = conv.geometry.output_size((8, 11))
    shortcut, mask = torch.randn(2, 10, *out), random_mask(2, out, density)
    branch = PackedBranch.of([conv], activation)
    got = masked_residual(x, mask, shortcut, branch, backend="cpu", break_even=2.0)
    want = masked_residual(x, mask, shortcut, branch, backend="eager")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@needs_kernels
@pytest.mark.parametrize(
    ("size", "stride"), [((8, 8), 1), ((7, 9), 2), ((1, 1), 1), ((1, 6), 2), ((13, 2), 1)]
)
@pytest.mark.parametrize("channels", [3, 16, 37])
def test_mask_logits(size: tuple[int, int], stride: int, channels: int, seed: int) -> None:
    unit = MaskUnit(channels, stride=stride).eval()
    x = torch.randn(3, channels, *size)
    want = unit.conv(x) + unit.linear(x.mean((2, 3)))[:, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(unit.logits(x), want, rtol=1e-4, atol=1e-4)


@needs_kernels
def test_results_are_the_same_from_run_to_run_and_over_threads(seed: int) -> None:
    conv = ConvSpec(torch.randn(48, 32, 3, 3), torch.randn(48), (1, 1), (1, 1), (1, 1), 1, "relu")
    branch = PackedBranch.of([conv], "relu")
    x, shortcut, mask = torch.randn(4, 32, 24, 24), torch.randn(4, 48, 24, 24), random_mask(4, (24, 24), 0.5)
    results = []
    for threads in (1, 2, 1):
        torch.set_num_threads(threads)
        results.append(masked_residual(x, mask, shortcut, branch, backend="cpu", break_even=2.0))
    torch.set_num_threads(1)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_switching_them_off_is_told_and_harmless() -> None:
    script = (
        "import torch, dynaconv as dc\n"
        "from dynaconv.ops import _native\n"
        "assert 'switches' in _native.missing()\n"
        "m = dc.create_model('dynconv_resnet8_cifar').eval()\n"
        "with torch.no_grad(): assert m(torch.randn(1, 3, 32, 32)).shape == (1, 10)\n"
    )
    environment = {**os.environ, "DYNACONV_NATIVE": "0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@needs_kernels
def test_grouped_branches_run_too(seed: int) -> None:
    convs = [
        ConvSpec(torch.randn(80, 3, 3, 3), torch.randn(80), (2, 1), (1, 1), (1, 1), 2, "hardswish"),
        ConvSpec(torch.randn(12, 20, 1, 1), None, (1, 1), (0, 0), (1, 1), 4, "hardsigmoid"),
        ConvSpec(torch.randn(6, 4, 3, 3), torch.randn(6), (1, 1), (1, 1), (1, 1), 3, "none"),
    ]
    with pytest.raises(RuntimeError, match="do not follow each other"):
        PackedBranch.of([convs[0], convs[2]], "relu")
    x, shortcut, mask = torch.randn(2, 6, 9, 7), torch.randn(2, 6, 5, 7), random_mask(2, (5, 7), 0.4)
    branch = PackedBranch.of(convs, "gelu")
    assert branch.native is not None
    got = masked_residual(x, mask, shortcut, branch, backend="cpu", break_even=2.0)
    want = masked_residual(x, mask, shortcut, branch, backend="eager")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_double_branches_stay_with_pytorch(seed: int) -> None:
    double = ConvSpec(torch.randn(4, 2, 3, 3).double(), None, (1, 1), (1, 1), (1, 1), 2)
    assert PackedBranch.of([double], "relu").native is None
    x = torch.randn(1, 4, 5, 5).double()
    y = masked_residual(x, torch.ones(1, 1, 5, 5), x, PackedBranch.of([double], "none"), backend="cpu")
    torch.testing.assert_close(y, x + F.conv2d(x, double.weight, None, 1, 1, 1, 2))


@needs_kernels
@pytest.mark.parametrize(("channels", "stride"), [(5, 1), (16, 2), (35, 1)])
def test_depthwise_in_the_middle_and_at_the_end(channels: int, stride: int, seed: int) -> None:
    def conv(out: int, inner: int, kernel: int, step: int, groups: int, act: str) -> ConvSpec:
        pad = (kernel // 2,) * 2
        return ConvSpec(torch.randn(out, inner, kernel, kernel), None, (step,) * 2, pad, (1, 1), groups, act)

    first = conv(channels, 6, 1, 1, 1, "relu6")
    middle = conv(channels, 1, 3, stride, channels, "relu6")
    x = torch.randn(2, 6, 9, 7)
    size = middle.geometry.output_size((9, 7))
    mask = random_mask(2, size, 0.4)
    for convs, width in (
        ([first, middle, conv(8, channels, 1, 1, 1, "none")], 8),
        ([first, middle], channels),
    ):
        branch = PackedBranch.of(convs, "none")
        assert branch.native is not None
        shortcut = torch.randn(2, width, *size)
        got = masked_residual(x, mask, shortcut, branch, backend="cpu", break_even=2.0)
        want = masked_residual(x, mask, shortcut, branch, backend="eager")
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
