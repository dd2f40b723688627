"""The file itself: standard operators, what it says about itself, its dial, its reports, and bad input."""

from __future__ import annotations

import copy
import json
import os
from collections import Counter

import numpy as np
import pytest
import torch
from tests.export.networks import example, masked

import dynaconv as dc
from dynaconv.export import read_metadata
from dynaconv.export.api import default_feed


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, dc.SpatialMasking())
    for i, gate in enumerate(dc.gates(model).values()):
        gate.conv.weight.data.mul_(0.1)
        gate.budget_table = torch.tensor([[0.3, 1.5, 1.0], [0.6, -0.5 + i * 0, 1.0]])
    return model.eval()


X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("lowering", ["sparse", "dense", "auto"])
def test_the_graph_is_standard_and_clean(model, lowering, tmp_path, trace_once) -> None:
    import onnx

    done = dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering=lowering)
    graph = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(graph, full_check=True)
    assert [(o.domain, o.version) for o in graph.opset_import] == [("", 18)]
    count = Counter(node.op_type for node in graph.graph.node)
    assert not {"BatchNormalization", "Identity", "Constant", "Dropout"} & set(count)
    assert all(not any(a.name == "transB" and a.i for a in n.attribute) for n in graph.graph.node)
    assert done.error < 1e-4 and done.flips < 1e-2
    if lowering == "sparse":
        # Two lists for each gate, and one write to the shortcut's rows. One convolution for the pictures and one for
        # each gate; everything else is a product of rows.
        assert count["NonZero"] == 6 and count["ScatterND"] == 3
        assert count["Conv"] == 1 + 3 + _dense_left(graph) and _dense_left(graph) <= 1
    else:
        assert ("NonZero" in count) == ("sparse" in done.blocks.values())
    assert str(tmp_path) not in graph.SerializeToString().decode("latin1")
    assert "lowering" in done.table() and "budget_threshold" in str(done)


def _dense_left(graph) -> int:
    """The first gate's product for all taps reads the map of the stem, which is no rows yet."""
    return sum(
        n.op_type == "Conv" and "images" not in n.input and len(n.input) == 2 for n in graph.graph.node
    )


@pytest.mark.parametrize("opset", [18, 20, 21, 23])
def test_newer_opsets(model, opset, tmp_path, trace_once) -> None:
    import onnx

    done = dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering="sparse", opset=opset)
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset == done.opset
    assert done.error < 1e-4


def test_the_dial_turns_the_file(model, tmp_path, ort, trace_once) -> None:
    path = tmp_path / "m.onnx"
    dc.export.onnx(model, (X,), path, lowering="sparse", report=("densities", "executed_macs"), check=False)
    spent = []
    for target, threshold in ((0.3, 1.5), (0.6, -0.5), (1.0, -np.inf)):
        dc.set_budget_(model, target)
        with dc.collect_masks(model) as masks, torch.no_grad():
            expected = model(X)
        got = ort(path, X, budget_threshold=threshold)
        np.testing.assert_allclose(got["output"], expected, rtol=1e-4, atol=1e-5)
        shares = torch.stack([m.densities for m in masks.values()], 1)
        np.testing.assert_allclose(got["densities"], shares, atol=1e-6)
        counted = dc.profile(model, X, include_linear=True).executed_macs
        np.testing.assert_allclose(got["executed_macs"], counted, rtol=1e-6)
        spent.append(got["executed_macs"].mean())
    dc.set_budget_(model, None)
    assert spent == sorted(spent)


def test_a_threshold_for_each_gate(model, tmp_path, ort, trace_once) -> None:
    path = tmp_path / "m.onnx"
    done = dc.export.onnx(model, (X,), path, lowering="sparse", dial="gates")
    assert done.inputs["thresholds"] == [3]
    shares = ort(path, X, thresholds=[-np.inf, np.inf, 0])["densities"]
    assert (shares[:, 0] == 1).all() and (shares[:, 1] == 0).all()
    fixed = dc.export.onnx(model, (X,), path, lowering="dense", dial=None, report=())
    assert list(fixed.inputs) == ["images"] and list(fixed.outputs) == ["output"]


def _settle(threshold: float | None):
    """A hook that sets a gate's threshold; None: between the logits of what it sees."""

    def settle(gate, args) -> None:
        gate.threshold.fill_(gate.logits(*args).quantile(0.5).item() if threshold is None else threshold)

    return settle


@pytest.mark.parametrize("threshold", [None, 100.0, -100.0, np.inf, -np.inf])
def test_fixed_gates_of_dense_blocks_decide_without_comparing(threshold, model, tmp_path, ort) -> None:
    import onnx

    fixed = copy.deepcopy(model)
    hooks = [gate.register_forward_pre_hook(_settle(threshold)) for gate in dc.gates(fixed).values()]
    with torch.no_grad():
        fixed(X)
    for hook in hooks:
        hook.remove()
    path = tmp_path / "m.onnx"
    done = dc.export.onnx(fixed, (X,), path, lowering="dense", dial=None)
    count = Counter(node.op_type for node in onnx.load(path).graph.node)
    assert not {"Greater", "GreaterOrEqual", "Cast"} & set(count)
    # Where nothing is left to decide, neither a gate nor a product with its mask is.
    decides = threshold is None or np.isfinite(threshold)
    assert count["HardSigmoid"] == count["Mul"] == 3 * decides
    assert count["Conv"] == (18 if decides else 9 if threshold < 0 else 3)
    kinds = {None: "dense", np.inf: "closed", -np.inf: "open"}
    assert set(done.blocks.values()) == {kinds.get(threshold, "dense")}
    assert done.error < 1e-4 and done.flips < 1e-2
    with dc.collect_masks(fixed) as masks, torch.no_grad():
        expected = fixed(X).numpy()
    got = ort(path, X)
    shares = np.stack([mask.mean((1, 2, 3)).numpy() for mask in masks.values()], 1)
    np.testing.assert_allclose(got["densities"], shares, atol=1e-2)
    assert 0.1 < shares.mean() < 0.9 if threshold is None else (shares == (threshold < 0)).all()
    if not done.flips:
        np.testing.assert_allclose(got["output"], expected, atol=1e-4 * abs(expected).max())
    if not decides:
        sparse = dc.export.onnx(fixed, (X,), path, lowering="sparse", dial=None)
        assert sparse.blocks == done.blocks and sparse.error < 1e-4


def test_gates_that_rows_do_not_fit_read_the_map(model, tmp_path, trace_once, monkeypatch) -> None:
    from dynaconv.export import gates

    written = [dc.export.onnx(model, (X,), tmp_path / "rows.onnx", lowering="sparse", check=True)]
    monkeypatch.setattr(gates, "_fits_rows", lambda _stage: False)
    written.append(dc.export.onnx(model, (X,), tmp_path / "map.onnx", lowering="sparse", check=True))
    assert all(done.error < 1e-4 and done.flips < 1e-3 for done in written)


def test_auto_follows_the_densities(tmp_path, trace_once, monkeypatch) -> None:
    from dynaconv.export import choose

    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, dc.SpatialMasking())
    model.eval()
    x = torch.randn(2, 3, 64, 64)
    for density, kind in ((0.0, "sparse"), (1.0, "dense")):
        done = dc.export.onnx(model, (x,), tmp_path / "m.onnx", densities=density, check=False)
        assert done.blocks["layer1.0"] == kind and done.densities["layer1.0"] == density
    assert {"product", "gathered", "written"} <= set(choose.measured_costs())
    with monkeypatch.context() as patch:
        patch.setattr(choose, "measured_costs", lambda: {"block": 1.0})
        done = dc.export.onnx(model, (x,), tmp_path / "m.onnx", densities=0.0, check=False)
        assert set(done.blocks.values()) == {"dense"}
    # A calibrated network brings its own, at the thresholds that are set.
    for i, gate in enumerate(dc.gates(model).values()):
        gate.budget_table = torch.tensor([[0.3, 1.0, 1.0, 0.1 * i], [0.6, -1.0, 1.0, 0.5]])
        gate.threshold.fill_(1.0)
    done = dc.export.onnx(model, (x,), tmp_path / "m.onnx", check=False)
    assert list(done.densities.values()) == pytest.approx([0.0, 0.1, 0.2])
    with pytest.raises(ValueError, match=r"densities must lie in \[0, 1\], got 1.5 for layer1.0"):
        dc.export.onnx(model, (x,), tmp_path / "m.onnx", densities={"layer1.0": 1.5})
    with pytest.raises(
        ValueError, match="densities names unknown blocks .layer9.; expected names such as layer1.0"
    ):
        dc.export.onnx(model, (x,), tmp_path / "m.onnx", densities={"layer9": 0.5})


def test_metadata(model, tmp_path, trace_once) -> None:
    path = tmp_path / "m.onnx"
    dc.export.onnx(
        model, (X,), path, lowering="sparse", metadata={"classes": ["a", "b"], "mean": [0.5]}, check=False
    )
    facts = read_metadata(path)
    assert facts["classes"] == ["a", "b"] and facts["dynaconv_version"] == dc.__version__
    assert facts["gates"] == ["layer1.0", "layer2.0", "layer3.0"] and facts["input_size"] == [3, 16, 16]
    assert facts["budgets"][0] == [0.3, 1.5, 1.0] and set(facts["lowering"].values()) == {"sparse"}
    json.dumps(facts)


def test_a_static_network_and_several_results(tmp_path, ort) -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(3)

        def forward(self, x):
            return {"y": self.a(self.b(x)), "same": x, "list": [x.mean((2, 3))]}

    model = Both().eval()
    done = dc.export.onnx(model, (X,), tmp_path / "m.onnx")
    assert list(done.outputs) == ["output_0", "output_1", "output_2"] and done.blocks == {}
    got = ort(tmp_path / "m.onnx", X)
    np.testing.assert_allclose(got["output_0"], model(X)["y"].detach(), atol=1e-5)
    np.testing.assert_array_equal(got["output_1"], X)


@pytest.mark.parametrize("dilation", [2, 3, 5])
def test_masks_of_dilated_convolutions_reach_as_far(dilation, tmp_path, ort) -> None:
    class Dilated(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv2d(3, 8, 3, padding=1)
            self.two = torch.nn.Conv2d(8, 3, 3, padding=dilation, dilation=dilation)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.two(torch.relu(self.one(x)))

    torch.manual_seed(0)
    model = torch.nn.Sequential(Dilated())
    dc.dynamize_(model, input_size=(3, 16, 16))
    gate = dc.gates(model.eval())["0"]
    with torch.no_grad():
        gate.threshold.fill_(float(gate._plain_logits(X).median()))
    done = dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering="sparse", check=True)
    assert done.error <= 1e-5


@pytest.mark.parametrize("lowering", ["sparse", "dense"])
def test_a_block_that_runs_twice_with_two_masks_is_no_difference(lowering, tmp_path, ort) -> None:
    class Twice(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.block = torch.nn.Conv2d(3, 8, 1), dc.models.BasicBlock(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.block(self.block(self.stem(x)))

    torch.manual_seed(0)
    model = Twice()
    dc.dynamize_(model, input_size=(3, 16, 16))
    gate = dc.gates(model)["block"]
    with torch.no_grad():
        gate.threshold.fill_(float(gate._plain_logits(model.eval().stem(X)).median()))
    done = dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering=lowering, check=True)
    assert done.error <= 1e-4


def test_what_a_network_returns_is_not_folded_into_what_follows(tmp_path, ort) -> None:
    class Returned(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Conv2d(3, 4, 1)
            self.conv, self.norm = torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)
            self.norm.running_var.fill_(3.0)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
            large, before = self.large(x), self.conv(x)
            return large, large + self.small(x), before, self.norm(before)

    done = dc.export.onnx(Returned().eval(), (X,), tmp_path / "m.onnx")
    assert done.error <= 1e-5 and len(done.outputs) == 4


def test_nothing_of_the_network_changes(model, tmp_path, trace_once) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) for m in model.modules()]
    dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering="sparse", report=("executed_macs",))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert default_feed(model, "gates")["thresholds"].shape == (3,)


def static():
    return dc.create_model("resnet8_cifar").eval()


MODE = "export needs a network in evaluation mode, but the model is in training mode; call model.eval()"
OLD = "opset 11 is too old: the exported graph needs operators of opset 18; use opset=18 or newer"
# (network from the fixture's, keyword arguments), kind of error, what it says.
BAD = {
    "training": (lambda m: static().train(), {}, ValueError, MODE),
    "module": (lambda m: "net", {}, TypeError, "export expects an nn.Module, got str"),
    "example": (lambda m: m, {"example": X}, TypeError, "export expects the example as a tuple (x,), got Tensor"),
    "no images": (lambda m: m, {"example": (X[:0],)}, ValueError, "at least one image"),
    "opset": (lambda m: m, {"opset": 11}, ValueError, OLD),
    "opset kind": (lambda m: m, {"opset": "18"}, ValueError, "opset must be a whole number from 18 to 23, got '18'"),
    "batch": (lambda m: m, {"batch": 0}, ValueError, "batch must be a whole number of images, 1 or more, got 0"),
    "lowering": (lambda m: m, {"lowering": "spars"}, ValueError, "'sparse'"),
    "dial": (lambda m: m, {"dial": "knob"}, ValueError, "dial"),
    "report": (lambda m: m, {"report": ("energy",)}, ValueError, "report"),
    "count": (
        lambda m: m, {"report": ("executed_macs",), "dynamic_size": True}, ValueError,
        "report='executed_macs' needs a fixed size",
    ),
    "static report": (
        lambda m: static(), {"report": ("executed_macs",)}, ValueError, "needs a network with gates"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, model, tmp_path) -> None:
    network, options, kind, words = BAD[case]
    options = dict(options)
    with pytest.raises(kind) as error:
        dc.export.onnx(network(model), options.pop("example", (X,)), tmp_path / "m.onnx", **options)
    assert words in str(error.value) and list(tmp_path.iterdir()) == []


def test_thresholds_that_differ_need_their_own_inputs(model, tmp_path) -> None:
    gate = dc.gates(model)["layer2.0"]
    gate.threshold.fill_(0.5)
    try:
        with pytest.raises(
            ValueError, match="have thresholds from 0 to 0.5, which one input cannot hold; use dial='gates'"
        ):
            dc.export.onnx(model, (X,), tmp_path / "m.onnx")
    finally:
        gate.threshold.fill_(0.0)


class Residual(torch.nn.Module):
    """A branch with a function of all channels at its end."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.end = torch.nn.Conv2d(4, 4, 3, padding=1), torch.nn.Softmax(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.end(self.conv(x))


def test_blocks_without_sparse_lowering_are_named(tmp_path, trace_once) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), Residual(), torch.nn.Conv2d(4, 2, 1))
    dc.dynamize_(model, dc.SpatialMasking())
    model.eval()
    with pytest.raises(ValueError) as error:
        dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering="sparse")
    reason = "its masked result is not a chain of convolutions and of functions of single positions"
    assert f"block '1' has no sparse lowering: {reason}; use lowering='auto'" in str(error.value)
    assert dc.export.onnx(model, (X,), tmp_path / "m.onnx", lowering="auto").error < 1e-4


def test_paths_that_cannot_be_written(model, tmp_path, monkeypatch, trace_once) -> None:
    with pytest.raises(IsADirectoryError):
        dc.export.onnx(model, (X,), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        dc.export.onnx(model, (X,), tmp_path / "file" / "m.onnx", check=False)

    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        dc.export.onnx(model, (X,), tmp_path / "m.onnx", check=False)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_missing_packages_name_their_extra(model, tmp_path, monkeypatch) -> None:
    from dynaconv.export import runtimes, trace

    monkeypatch.setattr(trace, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError,
        match=r"onnx and onnxscript are not installed; install with: pip install 'dynaconv\[export\]'",
    ):
        dc.export.onnx(model, (X,), tmp_path / "m.onnx")
    monkeypatch.setattr(runtimes, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"openvino is not installed; install with: pip install 'dynaconv\[engines\]'"
    ):
        runtimes.load("openvino", tmp_path / "m.onnx")


def test_a_graph_that_computes_something_else_is_not_written(
    model, tmp_path, monkeypatch, trace_once
) -> None:
    from dynaconv.export import tables

    monkeypatch.setattr(tables, "needed", lambda write, mask, *_: write("MaxPool", mask, kernel_shape=(1, 1)))
    given, masks = masked("basic")[1], example(masked("basic")[0], 2, 0.5)
    with pytest.raises(
        RuntimeError, match="the exported network differs from eager PyTorch by .* in ONNX Runtime at batch"
    ):
        dc.export.onnx(given, masks, tmp_path / "m.onnx", lowering="sparse", dial=None)
    assert list(tmp_path.iterdir()) == []


def test_files_of_others(tmp_path) -> None:
    import onnx
    from onnx import helper

    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_metadata(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("hello")
    with pytest.raises(ValueError, match="was not written by dynaconv .it is no ONNX file"):
        read_metadata(tmp_path / "text.onnx")
    value = helper.make_tensor_value_info("x", 1, [1])
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value], [helper.make_tensor_value_info("y", 1, [1])]
    )
    foreign = helper.make_model(graph)
    onnx.save(foreign, tmp_path / "f.onnx")
    with pytest.raises(
        ValueError, match="was not written by dynaconv .it has no dynaconv metadata.; make one with"
    ):
        read_metadata(tmp_path / "f.onnx")
    for text, words in (
        ("{", "its metadata is damaged"),
        ('{"format": 9}', "its metadata is not of format 1"),
    ):
        del foreign.metadata_props[:]
        helper.set_model_props(foreign, {"dynaconv": text})
        onnx.save(foreign, tmp_path / "f.onnx")
        with pytest.raises(ValueError, match=words):
            read_metadata(tmp_path / "f.onnx")
