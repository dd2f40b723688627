"""Networks compiled in bfloat16: close to the network, exact step by step, refused where the processor lacks it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from tests.engine.networks import NETWORKS, SIZE, exact_convolutions, network
from tests.engine.test_masks import KINDS, masked
from tests.engine.test_networks import check
from torch import nn

import dynaconv as dc
from dynaconv.convert import gates
from dynaconv.engine import pack, pack_bfloat16, runtime, verify
from dynaconv.engine.compiled import CompiledModel
from dynaconv.engine.compiler import make_plan
from dynaconv.engine.execute import Program
from dynaconv.engine.plan import Conv
from dynaconv.testing import force_masks
from dynaconv.testing.tolerances import assert_agree

HALF = torch.bfloat16
LACKS = runtime.missing_bfloat16()
needs_processor = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))
# Of the largest result, over networks of a few layers.
CLOSE = 3e-2


def compiled(model: nn.Module, backend: str = "auto") -> CompiledModel:
    return dc.compile(model, (torch.randn(1, *SIZE),), dtype=HALF, backend=backend, measure=False)


@needs_processor
@pytest.mark.parametrize("name", NETWORKS)
def test_results_are_close(name: str) -> None:
    model = network(name)
    fast = compiled(model)
    for n in (1, 3):
        x = torch.randn(n, *SIZE)
        check(fast, model, x, CLOSE)
        assert fast.verify((x,))["worst_error"] <= verify.STEP_TOLERANCE
    check(fast, model, torch.randn(2, *SIZE).to(memory_format=torch.channels_last), CLOSE)


@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_reads_what_nobody_wrote(name: str) -> None:
    model, x = network(name), torch.randn(2, *SIZE)
    plan, exported = make_plan(model, (x,), HALF)
    fast = CompiledModel(plan, exported.out_spec, backend="eager", source=model)
    fast._program = Program(plan, "eager", poison=True)
    with exact_convolutions():
        check(fast, model, x, CLOSE)


@needs_processor
@pytest.mark.parametrize("kind", KINDS)
def test_masked_blocks_are_close(kind: str) -> None:
    model = masked(kind)
    fast = compiled(model)
    for density in (0.0, 0.3, 1.0):
        with force_masks(model, density):
            check(fast, model, torch.randn(3, *SIZE), CLOSE)
            fast.verify((torch.randn(3, *SIZE),))


@needs_processor
@pytest.mark.parametrize("model", ["condconv", "dyconv", "dcd"])
def test_mixed_kernels_are_close(model: str) -> None:
    kinds = {"condconv": dc.nn.CondConv2d, "dyconv": dc.nn.DYConv2d, "dcd": dc.nn.DCDConv2d}
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), kinds[model](16, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 4, 1)
    )
    fast = compiled(net.eval())
    x = torch.randn(2, *SIZE)
    check(fast, net, x, CLOSE)
    fast.verify((x,))


@needs_processor
def test_maps_are_bfloat16_and_decisions_float32() -> None:
    model = masked("inverted")
    plan = compiled(model).plan.raw
    for step in plan.steps:
        if step.kind in ("inverted", "conv", "depthwise"):
            assert plan.values[step.input].dtype == "bfloat16"
            convs = [plan.convs[c] for c in step.conv if c >= 0]
            assert all(w is None or w.dtype == HALF for c in convs for w in (c.weight, c.winograd))
        if step.kind in ("gate", "threshold"):
            logits = step.out if step.kind == "gate" else step.input
            assert plan.values[logits].dtype == "float32"
    assert all(plan.values[e.value].dtype == "float32" for e in plan.externals)
    halved, full = plan.arena_bytes, make_plan(model, (torch.randn(1, *SIZE),))[0].arena_bytes
    assert halved < 0.7 * full
    assert gates(model)


@needs_processor
def test_results_do_not_depend_on_threads_or_neighbours() -> None:
    model = masked("bottleneck")
    fast, x = compiled(model), torch.randn(4, *SIZE)
    with force_masks(model, 0.5):
        expected = fast(x)
        for threads in (1, 2, 5):
            fast.threads = threads
            assert torch.equal(fast(x), expected)
    fast.threads = 2
    alone = network("residual")
    fast = compiled(alone)
    assert torch.equal(fast(x)[1:2], fast(x[1:2]))


@needs_processor
def test_a_saved_model_gives_the_same_bits(tmp_path) -> None:
    fast, x = compiled(masked("inverted")), torch.randn(2, *SIZE)
    loaded = dc.engine.load(fast.save(tmp_path / "half.safetensors"))
    assert loaded.plan.raw.dtype == "bfloat16"
    assert torch.equal(loaded(x), fast(x))
    loaded.verify((x,))


@needs_processor
def test_verify_finds_a_wrong_weight() -> None:
    model, x = network("residual"), torch.randn(2, *SIZE)
    plan, exported = make_plan(model, (x,), HALF)
    conv = next(c for c in plan.convs if c.form == "conv")
    fast = CompiledModel(plan, exported.out_spec, source=model)
    conv.weight.mul_(1.5)
    with pytest.raises(RuntimeError, match="differs from the eager result"):
        fast.verify((x,), tolerance=1e-2)


def test_the_interpreter_rounds_on_any_processor() -> None:
    model, x = network("squeeze_excite"), torch.randn(2, *SIZE)
    fast = compiled(model, backend="eager")
    check(fast, model, x, CLOSE)
    assert not torch.equal(fast(x), dc.compile(model, (x,), backend="eager")(x))


def test_a_processor_without_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    if runtime.missing():
        pytest.skip(runtime.missing())
    monkeypatch.setattr(runtime, "missing_bfloat16", lambda: "this processor has no AVX512_BF16")
    with pytest.raises(ValueError, match="dtype=torch.bfloat16: this processor has no AVX512_BF16"):
        compiled(network("residual"))


def test_another_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="kernels for torch.float32 and torch.bfloat16"):
        dc.compile(network("residual"), (torch.randn(1, *SIZE),), dtype=torch.float16)


@needs_processor
def test_the_library_refuses_too(tmp_path) -> None:
    path = compiled(network("residual")).save(tmp_path / "half.safetensors")
    code = (
        "import sys, dynaconv\n"
        "from dynaconv.engine import files, runtime\n"
        "assert runtime.missing_bfloat16() == 'this processor has no AVX512_BF16'\n"
        "for read in (dynaconv.engine.load, lambda p: runtime.NativePlan(files.load(p)[0])):\n"
        "    try: read(sys.argv[1])\n"
        "    except (ValueError, RuntimeError) as error: print(error)\n"
    )
    environment = {**os.environ, "DYNACONV_ISA": "avx2"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("AVX512_BF16") == 2, done.stdout


@pytest.mark.parametrize(
    ("groups", "inner", "outputs", "kernel"), [(1, 5, 33, (3, 3)), (3, 4, 7, (1, 2)), (1, 1, 64, (5, 1))]
)
def test_packed_pairs_are_unpacked(groups: int, inner: int, outputs: int, kernel: tuple[int, int]) -> None:
    weight, bias = (
        torch.randn(groups * outputs, inner, *kernel).to(HALF).float(),
        torch.randn(groups, outputs),
    )
    for form in ("conv", "stem") if groups == 1 else ("conv",):
        packed = pack_bfloat16.pack_pairs(weight, groups, form == "stem")
        conv = Conv(form, inner * groups, outputs * groups, groups, kernel, weight=packed, bias=bias)
        assert packed.dtype == HALF and packed.shape[-2:] == (32, 2)
        got, shifts = pack_bfloat16.unpack(conv)
        assert torch.equal(got, weight) and torch.equal(shifts, bias.flatten())


@pytest.mark.parametrize(("inner", "outputs"), [(1, 5), (7, 33), (16, 64)])
def test_weights_come_back_from_winograds_alone(inner: int, outputs: int) -> None:
    weight, bias = torch.randn(outputs, inner, 3, 3), torch.randn(1, outputs)
    points = pack.pack_winograd(weight)
    pairs = pack_bfloat16.pair_points(points)
    assert pairs.dtype == HALF and pairs.shape == (-(-outputs // 32), 16, (inner + 1) // 2, 32, 2)
    assert torch.equal(pack_bfloat16.part_points(pairs, inner), points.to(HALF).float())
    conv = Conv("conv", inner, outputs, 1, (3, 3), padding=(1, 1), winograd=pairs, bias=bias)
    got, shifts = pack.unpack(conv)
    assert_agree(got, weight, dtype=HALF)
    assert torch.equal(shifts, bias.flatten())


@needs_processor
def test_winograd_serves_where_it_is_cheaper() -> None:
    layers = [nn.Conv2d(3, 48, 3, padding=1), nn.ReLU(), nn.Conv2d(48, 64, 3, padding=1), nn.Conv2d(64, 5, 1)]
    model = nn.Sequential(*layers).eval()
    x = torch.randn(2, 3, 24, 20)
    fast = dc.compile(model, (x,), dtype=HALF, backend="cpu", measure=False)
    alone = [c for c in fast.plan.raw.convs if c.weight is None and c.winograd is not None]
    assert alone and all(c.winograd.dtype == HALF for c in alone)
    fast.verify((x,))


@pytest.mark.parametrize("kernel", [(1, 1), (2, 3), (3, 3), (5, 5), (7, 7), (4, 2)])
@pytest.mark.parametrize("channels", [1, 32, 40])
def test_packed_taps_are_unpacked(channels: int, kernel: tuple[int, int]) -> None:
    weight, bias = torch.randn(channels, 1, *kernel).to(HALF).float(), torch.randn(channels)
    packed, shifts = pack_bfloat16.pack_depthwise(weight, bias)
    conv = Conv("depthwise", channels, channels, channels, kernel, weight=packed, bias=shifts)
    got, back = pack_bfloat16.unpack(conv)
    assert torch.equal(got, weight) and torch.equal(back, bias) and len(shifts) % 32 == 0
