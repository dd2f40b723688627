"""Saving, budgets, backends, threads, errors: what surrounds a compiled model."""

from __future__ import annotations

import copy
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tests.engine.networks import NETWORKS, SIZE, Lambda, network
from tests.engine.test_masks import masked
from tests.engine.test_networks import BACKENDS, check
from torch.utils import _pytree

import dynaconv as dc
from dynaconv.engine import files, load, runtime
from dynaconv.engine.compiler import make_plan
from dynaconv.engine.plan import Plan
from dynaconv.ops import _native
from dynaconv.testing import force_masks

EXAMPLE = (torch.zeros(1, *SIZE),)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "name", ["residual", "convnext", "many_results", "half_through_aten", "no_batch_axis", "split"]
)
def test_saved_and_loaded_models_agree(name: str, backend: str, tmp_path: Path) -> None:
    model = network(name)
    fast = dc.compile(model, EXAMPLE, backend=backend)
    again = load(fast.save(tmp_path / "fast.plan"), backend=backend)
    x = torch.randn(2, *SIZE)
    for a, b in zip(_pytree.tree_leaves(fast(x)), _pytree.tree_leaves(again(x)), strict=True):
        assert a == b if not isinstance(a, torch.Tensor) else torch.equal(a, b)
    check(again, model, x)
    assert again.verify((x,))["reference"] == "interpreter"
    assert [p.name for p in tmp_path.iterdir()] == ["fast.plan"]


def test_a_loaded_model_knows_its_gates(tmp_path: Path) -> None:
    model = masked("basic")
    fast = dc.compile(model, EXAMPLE)
    again = load(fast.save(tmp_path / "fast.plan"))
    x = torch.randn(2, *SIZE)
    with force_masks(model, 0.3), force_masks(again, 0.3):
        check(again, model, x)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    file = dc.compile(network("residual"), EXAMPLE, backend="eager").save(tmp_path / "fast.plan")
    whole = file.read_bytes()
    for size in (0, 7, 300, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut short"):
            load(file)
    with pytest.raises(FileNotFoundError, match="no compiled model"):
        load(tmp_path / "nothing")


def _resave(file: Path, change) -> None:
    with safe_open(file, "pt") as opened:
        metadata, tensors = opened.metadata(), {k: opened.get_tensor(k) for k in opened.keys()}
    change(metadata, tensors)
    metadata["checksum"] = files.checksum(metadata["plan"], tensors)
    save_file(tensors, file, metadata=metadata)


def test_files_of_other_versions_are_refused(tmp_path: Path) -> None:
    file = dc.compile(network("residual"), EXAMPLE, backend="eager").save(tmp_path / "fast.plan")
    _resave(file, lambda m, t: m.update(format="99"))
    with pytest.raises(ValueError, match="format 99"):
        load(file)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="no compiled model"):
        load(file)


@pytest.mark.parametrize("field", ["steps", "values", "image", "out_spec"])
def test_files_that_lack_something_are_refused(field: str, tmp_path: Path) -> None:
    file = dc.compile(network("residual"), EXAMPLE, backend="eager").save(tmp_path / "fast.plan")

    def drop(metadata, tensors) -> None:
        plan = json.loads(metadata["plan"])
        del plan[field]
        metadata["plan"] = json.dumps(plan)

    _resave(file, drop)
    with pytest.raises(ValueError, match="damaged or cut short"):
        load(file)


def test_files_whose_weights_do_not_fit_are_refused(tmp_path: Path) -> None:
    """The kernels would read past their end."""
    file = dc.compile(masked("inverted"), EXAMPLE, backend="eager").save(tmp_path / "fast.plan")
    whole = file.read_bytes()
    with safe_open(file, "pt") as opened:
        names = [name for name in opened.keys() if name.startswith("conv.")]
    for name in names:
        file.write_bytes(whole)
        _resave(file, lambda m, t, name=name: t.update({name: t[name].flatten()[:-1].clone()}))
        with pytest.raises(ValueError, match=r"must be \[.*compile and save it again"):
            load(file)
    file.write_bytes(whole)
    _resave(file, lambda m, t: m.update(plan=m["plan"].replace('"form": "depthwise"', '"form": "conv"')))
    with pytest.raises(ValueError, match="packed for depthwise"):
        load(file)


def test_operators_of_others_run_but_are_not_written(tmp_path: Path) -> None:
    @torch.library.custom_op("dynaconv_test::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)
    model = Lambda(lambda m, x: m.conv(twice(m.conv(x))), conv=torch.nn.Conv2d(3, 3, 1)).eval()
    fast = dc.compile(model, EXAMPLE)
    check(fast, model, torch.randn(2, *SIZE))
    with pytest.raises(TypeError, match="cannot be saved: it runs 'dynaconv_test::twice.default'"):
        fast.save(tmp_path / "fast.plan")
    assert not list(tmp_path.iterdir())


def test_files_cannot_name_any_function(tmp_path: Path) -> None:
    file = dc.compile(network("transposed"), EXAMPLE, backend="eager").save(tmp_path / "fast.plan")
    _resave(file, lambda m, t: m.update(plan=m["plan"].replace("aten::conv_transpose2d.input", "os:system")))
    with pytest.raises(ValueError, match="calls os:system"):
        load(file)


def test_budgets_follow_the_calibration() -> None:
    model = masked("basic", unit="conv1x1")
    images = [torch.randn(4, *SIZE)]
    fast = dc.compile(model, EXAMPLE)
    with pytest.raises(ValueError, match="not calibrated"):
        fast.set_budget(0.5)
    dc.calibrate_(model, images, targets=(0.3, 0.7))
    fast = dc.compile(model, EXAMPLE)
    for target in (0.3, 0.5, 0.7, 1.0, None):
        assert fast.set_budget(target) == pytest.approx(dc.set_budget_(model, target))
        check(fast, model, images[0])
    with pytest.raises(ValueError, match="outside the calibrated range"):
        fast.set_budget(0.9)
    with pytest.raises(ValueError, match="no gates"):
        dc.compile(network("residual"), EXAMPLE).set_budget(0.5)


def test_backends_are_explicit(monkeypatch: pytest.MonkeyPatch) -> None:
    model = network("residual")
    with pytest.raises(ValueError, match="unknown backend"):
        dc.compile(model, EXAMPLE, backend="gpu")
    with pytest.raises(RuntimeError, match="no Triton"):
        dc.compile(model, EXAMPLE, backend="triton")
    monkeypatch.setattr(_native, "load", lambda: (None, "they are on holiday"))
    with pytest.raises(RuntimeError, match="on holiday"):
        dc.compile(model, EXAMPLE, backend="cpu")
    fast = dc.compile(model, EXAMPLE)
    assert fast.backend == "eager" and "on holiday" in str(fast.plan)
    check(fast, model, torch.randn(2, *SIZE))


@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_share_one_model(backend: str) -> None:
    model = masked("basic_s2")
    fast = dc.compile(model, EXAMPLE, backend=backend)
    inputs = [torch.randn(n, *SIZE) for n in (1, 2, 3, 2)]
    expected = [fast(x) for x in inputs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(10):
            if not torch.equal(fast(inputs[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i % 4,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("backend", BACKENDS)
def test_wrong_inputs_are_named(backend: str) -> None:
    fast = dc.compile(network("residual"), EXAMPLE, backend=backend)
    cases = [
        (torch.zeros(1, 3, 17, 14), ValueError, r"compiled for x \[N, 3, 17, 13\], got \[1, 3, 17, 14\]"),
        (torch.zeros(3, 17, 13), ValueError, r"got \[3, 17, 13\]"),
        (torch.zeros(1, 4, 17, 13), ValueError, "got"),
        (torch.zeros(1, *SIZE, dtype=torch.float64), TypeError, "torch.float64; convert it with x.float"),
        (torch.zeros(1, *SIZE, device="meta"), ValueError, "got x on meta"),
        (torch.zeros(1, *SIZE).to_sparse(), ValueError, "layout"),
        ("x", TypeError, "expects a tensor"),
    ]
    for x, kind, text in cases:
        with pytest.raises(kind, match=text):
            fast(x)
    with pytest.raises(TypeError, match="takes 1 inputs, got 2"):
        fast(torch.zeros(1, *SIZE), torch.zeros(1))


def test_what_cannot_be_compiled_is_named() -> None:
    model = network("residual")
    with pytest.raises(ValueError, match=r"in training mode; call model.eval"):
        dc.compile(network("residual").train(), EXAMPLE)
    with pytest.raises(TypeError, match=r"nn.Module, got function"):
        dc.compile(lambda x: x, EXAMPLE)
    with pytest.raises(TypeError, match="as a tuple"):
        dc.compile(model, EXAMPLE[0])
    with pytest.raises(TypeError, match="as the first example input, got int"):
        dc.compile(model, (3,))
    with pytest.raises(ValueError, match="at least one image"):
        dc.compile(model, (torch.zeros(0, *SIZE),))
    with pytest.raises(ValueError, match="cannot use dtype=torch.float16"):
        dc.compile(model, EXAMPLE, dtype=torch.float16)

    class Decides(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch.export cannot follow the forward of Decides"):
        dc.compile(Decides().eval(), EXAMPLE)


def test_networks_that_change_themselves_are_refused() -> None:
    class Counts(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return x * self.calls

    with pytest.raises(ValueError, match="'calls'"):
        dc.compile(Counts().eval(), EXAMPLE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_verify_names_the_worst_layer(backend: str) -> None:
    model, x = network("residual"), torch.randn(2, *SIZE)
    fast = dc.compile(model, EXAMPLE, backend=backend)
    report = fast.verify((x,))
    assert report["error"] <= report["tolerance"] and report["reference"] == "eager"
    with torch.no_grad():
        model[1].a[0].weight.mul_(1.01)
    with pytest.raises(RuntimeError, match="differs from the eager result"):
        fast.verify((x,))


@pytest.mark.skipif(bool(runtime.missing()), reason="no kernels")
def test_verify_names_a_broken_step() -> None:
    model, x = network("residual"), torch.randn(2, *SIZE)
    fast = dc.compile(model, EXAMPLE, backend="cpu")
    plan = fast.plan.raw
    broken = copy.copy(plan)
    broken.steps = [replace(s, final_activation="none") if s.input2 >= 0 else s for s in plan.steps]
    fast._program.native = runtime.NativePlan(broken)
    with pytest.raises(RuntimeError, match=r"the worst step is conv of 1"):
        fast.verify((x,))


def test_the_plan_can_be_printed() -> None:
    fast = dc.compile(masked("basic_s2"), EXAMPLE)
    text = str(fast.plan)
    assert "break-even" in text and "backend" in text and "1.block.conv1" in text
    keys = {"layer", "kernel", "dense_ms", "sparse_ms", "break_even", "choice", "reason"}
    assert all(set(row) == keys for row in fast.plan.steps)
    assert repr(fast).startswith("CompiledModel(")


def test_every_network_has_a_plan_that_can_be_kept() -> None:
    """Nothing in the zoo needs what JSON cannot say."""
    for name in NETWORKS.keys() - {"regions", "branches"}:
        plan, _ = make_plan(network(name), EXAMPLE)
        text = json.dumps(plan.to_json())
        assert json.dumps(Plan.from_json(json.loads(text), plan.tensors()).to_json()) == text
