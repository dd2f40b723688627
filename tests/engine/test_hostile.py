"""Inputs, masks and files that nobody planned for: the right result or a clear error, never a crash."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from tests.engine.networks import SIZE, exact_convolutions, network
from tests.engine.test_masks import masked
from tests.engine.test_networks import BACKENDS, check
from torch import nn

import dynaconv as dc
import dynaconv.nn as dnn
from dynaconv.engine import files, load, runtime
from dynaconv.testing import assert_agree, force_masks

EXAMPLE = (torch.zeros(1, *SIZE),)
needs_kernels = pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last),
    "every second column": lambda x: torch.stack([x, -x], -1).flatten(3)[..., ::2],
    "a window": lambda x: torch.nn.functional.pad(x, (3, 2, 1, 4))[:, :, 1:-4, 3:-2],
    "a window of channels_last": lambda x: torch.nn.functional.pad(
        x.to(memory_format=torch.channels_last), (1, 1)
    )[..., 1:-1],
    "flipped": lambda x: x.flip(3).flip(3),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "some channels": lambda x: torch.cat([x, -x], 1)[:, :3],
    "some images": lambda x: torch.stack([x, -x], 1).flatten(0, 1)[::2],
    "one image, expanded": lambda x: x[:1].expand(len(x), -1, -1, -1),
    "one channel, expanded": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "one number, expanded": lambda x: x[:1, :1, :1, :1].expand(x.shape),
    "leaf of a graph": lambda x: x.clone().requires_grad_(),
    "inference tensor": lambda x: _inference(x),
    "parameter": lambda x: torch.nn.Parameter(x.clone()),
}


def _inference(x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return x.clone()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_any_layout(layout: str, backend: str) -> None:
    model = masked("basic")
    fast = dc.compile(model, EXAMPLE, backend=backend, measure=False)
    for n in (1, 3):
        x = LAYOUTS[layout](torch.randn(n, *SIZE, generator=torch.Generator().manual_seed(n)))
        assert x.shape == (n, *SIZE)
        before = x.detach().clone()
        with torch.no_grad():
            expected = model(x)
        y = fast(x)
        assert_agree(y, expected)
        assert not y.requires_grad and torch.equal(x, before)
        assert backend == "eager" or torch.equal(y, fast(before.contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["basic", "bottleneck", "inverted"])
@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none_stay_where_they_belong(number: float, kind: str, backend: str) -> None:
    model = masked(kind)
    fast = dc.compile(model, EXAMPLE, backend=backend, measure=False)
    x = torch.randn(2, *SIZE)
    x[0, 1, 3, 4] = number
    for density in (0.0, 0.6, 1.0):
        with exact_convolutions(), force_masks(model, density), torch.no_grad():
            expected, y = model(x), fast(x)
        # Run densely, a closed position is 0 * NaN; Winograd's transforms make NaN of infinities. Neither goes further.
        spoilt = ~expected.isfinite()
        assert (y.isfinite() | spoilt).all() and y[1].isfinite().all()
        assert_agree(y.masked_fill(spoilt, 0), expected.masked_fill(spoilt, 0))
        assert density < 1 or (~y.isfinite() == spoilt).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_are_not_decided_from_what_is_no_number(backend: str) -> None:
    model = masked("basic")
    fast = dc.compile(model, EXAMPLE, backend=backend, measure=False)
    x, spoilt = torch.randn(2, *SIZE), torch.randn(2, *SIZE)
    spoilt[1, 0, 2, 2] = float("nan")
    before = fast(x)
    for call in (fast, fast.run_with_stats):
        with pytest.raises(ValueError, match=f"logits of '{fast.gates[0]}.gate' are NaN.*isfinite"):
            call(spoilt)
    with force_masks(model, 0.0):
        fast(spoilt)
    assert torch.equal(fast(x), before)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "gate" in name and p.dim() == 4).fill_(float("nan"))
    with pytest.raises(ValueError, match="are NaN"):
        dc.compile(model, EXAMPLE, backend=backend, measure=False)(x)


@needs_kernels
def test_too_many_images_are_refused_before_memory_is_taken() -> None:
    for name in ("residual", "many_results", "half_through_aten"):
        fast = dc.compile(network(name), EXAMPLE, backend="cpu", measure=False)
        most = fast._program.native.most_images
        x = torch.zeros(1, *SIZE).expand(most + 1, *SIZE)
        with pytest.raises(ValueError, match=rf"at most {most} images of this size, got {most + 1}"):
            fast(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["basic_s2", "inverted"])
def test_no_images(kind: str, backend: str) -> None:
    model = masked(kind)
    fast = dc.compile(model, EXAMPLE, backend=backend, measure=False)
    with torch.no_grad():
        expected = model(torch.zeros(0, *SIZE))
    for x in (
        torch.zeros(0, *SIZE),
        torch.zeros(2, *SIZE)[:0],
        torch.zeros(0, 17, 13, 3).permute(0, 3, 1, 2),
    ):
        y = fast(x)
        assert y.shape == expected.shape and y.dtype == expected.dtype
    check(fast, model, torch.randn(2, *SIZE))


def bytes_of(model: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a compiled model."""
    file = tmp_path_factory.mktemp("plans") / "fast.plan"
    dc.compile(model, EXAMPLE, backend="eager").save(file)
    return file.read_bytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bytes_of(masked("inverted"), tmp_path_factory)


@pytest.fixture(scope="module")
def saved_mixed(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Experts, fused channels in both forms, and parts of maps."""
    torch.manual_seed(0)
    layers = (
        dnn.CondConv2d(3, 8, 3, num_experts=2), dnn.DCDConv2d(8, 40, 1), dnn.DCDConv2d(40, 12, 3, groups=2),
        nn.ChannelShuffle(2), dnn.ODConv2d(12, 12, 3, groups=12), dnn.DyNetConv2d(12, 6, 1, group_size=2),
    )  # fmt: skip
    return bytes_of(nn.Sequential(*layers).eval(), tmp_path_factory)


def refused(file: Path) -> None:
    """Loading says why it does not."""
    with pytest.raises(ValueError, match="compile (it again|and save it again)"):
        load(file)


def test_files_cut_anywhere(saved: bytes, tmp_path: Path) -> None:
    file = tmp_path / "fast.plan"
    header = 8 + int.from_bytes(saved[:8], "little")
    for size in [*range(12), *range(12, len(saved), 997), header - 1, header, header + 1, len(saved) - 1]:
        file.write_bytes(saved[:size])
        refused(file)
    file.write_bytes(saved + b"\0")
    refused(file)


@given(data=st.data())
def test_files_with_a_changed_bit(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    changed, header = bytearray(saved), 8 + int.from_bytes(saved[:8], "little")
    # Half of them in the plan, half in the weights.
    place = data.draw(st.integers(0, header - 1) | st.integers(header, len(saved) - 1))
    changed[place] ^= 1 << data.draw(st.integers(0, 7))
    file = tmp_path_factory.mktemp("changed") / "fast.plan"
    file.write_bytes(bytes(changed))
    # Blanks that fill up a header mean nothing.
    if saved[place : place + 1] != b" " or not saved[place:header].isspace():
        refused(file)


NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 64, 32768, 2**31 - 1, -(2**31), 10**6])


@given(data=st.data())
def test_plans_with_changed_numbers(
    saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    survives(saved, tmp_path_factory, data)


@given(data=st.data())
def test_plans_of_mixed_kernels_with_changed_numbers(
    saved_mixed: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    survives(saved_mixed, tmp_path_factory, data)


def survives(saved: bytes, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """A file that was changed on purpose, with a checksum that fits, neither crashes nor reads foreign memory."""
    file = tmp_path_factory.mktemp("changed") / "fast.plan"
    file.write_bytes(saved)
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}
    plan = json.loads(metadata["plan"])
    tables = ["values", "convs", "grids", "steps", "externals", "segments"]
    tables = [*(name for name in tables if plan[name]), "arena", "image"]
    for _ in range(data.draw(st.integers(1, 2))):
        table = data.draw(st.sampled_from(tables))
        if table == "arena":
            plan["arena_bytes"] = data.draw(NUMBERS)
            continue
        row = plan["image"] if table == "image" else data.draw(st.sampled_from(plan[table]))
        places = list(_numbers(row))
        holder, key = places[data.draw(st.integers(0, len(places) - 1))]
        holder[key] = data.draw(NUMBERS)
    metadata["plan"] = json.dumps(plan)
    metadata["checksum"] = files.checksum(metadata["plan"], tensors)
    save_file(tensors, file, metadata=metadata)
    try:
        fast = load(file)
    except ValueError:
        return
    size = fast._program.plan.image
    # What Python makes of nonsense is its own affair; the kernels must not read foreign memory.
    with suppress(
        ValueError, TypeError, AttributeError, LookupError, RuntimeError, MemoryError, AssertionError
    ):
        if max(size) < 100:
            fast(torch.randn(2, *size))


def _numbers(row):
    """(holder, key) of every integer in a tree."""
    for key, value in row.items() if isinstance(row, dict) else enumerate(row):
        if isinstance(value, (dict, list)):
            yield from _numbers(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            yield row, key
