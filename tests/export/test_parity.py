"""ONNX Runtime gives what eager gives: every family, both lowerings, batches, densities, another size."""

from __future__ import annotations

import copy
from importlib.util import find_spec

import pytest
import torch
from tests.convert.networks import randomise_norms
from tests.export.networks import (
    KERNELS,
    MASKED,
    OTHER_SIZES,
    SIZE,
    SIZES,
    example,
    masked,
    masked_kernels,
    needed,
    spread_routers,
)
from torch import nn

import dynaconv as dc
from dynaconv.testing import MaskInputs

CASES = [(n, density) for n in (1, 3, 8) for density in (0.0, 0.3, 1.0)]


def agree(got, expected) -> None:
    expected = expected.numpy()
    error = abs(got - expected).max() / abs(expected).max()
    assert got.shape == expected.shape and error <= 1e-4, error


@pytest.mark.parametrize("name", MASKED)
def test_every_family(name, tmp_path, ort, trace_once) -> None:
    if needed(name) and find_spec(needed(name)) is None:
        pytest.skip(f"{needed(name)} is not installed")
    model, given = masked(name)
    size = SIZES.get(name, SIZE)
    for lowering in ("sparse", "dense"):
        path = tmp_path / f"{lowering}.onnx"
        done = dc.export.onnx(
            given,
            example(model, 2, 0.5, size),
            path,
            lowering=lowering,
            dial=None,
            report=(),
            check=False,
            dynamic_size=True,
        )
        assert set(done.blocks.values()) == {lowering}
        sizes = [*((n, d, size) for n, d in CASES), (2, 0.3, OTHER_SIZES.get(name, (3, 20, 9)))]
        for n, density, shape in sizes:
            inputs = example(model, n, density, shape)
            with torch.no_grad():
                agree(ort(path, *inputs)["output"], given(*inputs))


@pytest.mark.parametrize("name", ["basic", "timm mobile", "channels", "layer_gate"])
def test_fixed_sizes_are_constants_in_the_graph(name, tmp_path, ort, trace_once) -> None:
    if needed(name) and find_spec(needed(name)) is None:
        pytest.skip(f"{needed(name)} is not installed")
    model, given = masked(name)
    for lowering in ("sparse", "dense"):
        path = tmp_path / f"{lowering}.onnx"
        dc.export.onnx(
            given, example(model, 2, 0.5), path, lowering=lowering, dial=None, report=(), check=False
        )
        for n, density in CASES:
            inputs = example(model, n, density)
            with torch.no_grad():
                agree(ort(path, *inputs)["output"], given(*inputs))


class Wide(nn.Module):
    """Two convolutions of 128 channels, the second with a bias; the first reads the map, the second listed rows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm = nn.Conv2d(128, 128, 3, padding=1, bias=False), nn.BatchNorm2d(128)
        self.conv2 = nn.Conv2d(128, 128, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.conv2(self.norm(self.conv1(x)).relu())).relu()


@pytest.mark.parametrize(("batch", "tiles"), [(1, 0), (6, 2)])
def test_wide_convolutions_run_by_tiles(batch, tiles, tmp_path, ort) -> None:
    import onnx

    from dynaconv.export.runtimes import load

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 128, 1), Wide(), nn.Conv2d(128, 5, 1))
    randomise_norms(model)
    dc.dynamize_(model, dc.SpatialMasking())
    given, path = MaskInputs(copy.deepcopy(model)).eval(), tmp_path / "m.onnx"
    size = (3, 12, 16)
    options = {"lowering": "sparse", "dial": None, "report": (), "check": False}
    for allowed in (True, False):
        dc.export.onnx(given, example(model, 2, 0.5, size), path, batch=batch, winograd=allowed, **options)
        weights = [tuple(w.dims) for w in onnx.load(path).graph.initializer]
        assert weights.count((16, 128, 128)) == (tiles if allowed else 0)
        # Single positions, too, which open most tiles for a quarter.
        for n, density in [*CASES, (2, 0.02)]:
            inputs = example(model, n, density, size)
            with torch.no_grad():
                agree(ort(path, *inputs)["output"], given(*inputs))
        if find_spec("openvino") is not None:
            run = load("openvino", path, 1)
            for n, density in CASES:
                inputs = example(model, n, density, size)
                with torch.no_grad():
                    agree(run(feed_of(inputs))["output"], given(*inputs))


def feed_of(inputs) -> dict:
    return {f"input_{i}" if i else "images": t.numpy() for i, t in enumerate(inputs)}


@pytest.mark.parametrize(
    ("kind", "batch"), [*((kind, 2) for kind in ("all", *KERNELS)), ("all", 1), ("dcd", 1)]
)
def test_masked_dynamic_kernels_skip(kind, batch, tmp_path, trace_once) -> None:
    """A batch of 1 that is fixed has one kernel for all rows."""
    from dynaconv.export.runtimes import load

    model = masked_kernels(kind)
    given = MaskInputs(copy.deepcopy(model)).eval()
    cases = [(n, density, SIZE) for n, density in CASES if batch > 1 or n == 1]
    cases += [(2, 0.3, (3, 20, 9))] if batch > 1 else []
    expected = {case: _eager(given, example(model, *case)) for case in cases}
    for lowering in ("sparse", "dense"):
        path = tmp_path / f"{lowering}.onnx"
        done = dc.export.onnx(
            given, example(model, batch, 0.5), path, lowering=lowering, dial=None, report=(), check=False,
            dynamic_batch=batch > 1, dynamic_size=batch > 1,
        )  # fmt: skip
        assert set(done.blocks.values()) == {lowering}
        for engine in ("ort", "openvino"):
            if engine == "openvino" and (lowering == "dense" or find_spec("openvino") is None):
                continue
            run = load(engine, path, 1)
            for case, y in expected.items():
                agree(run(feed_of(example(model, *case)))["output"], y)


@pytest.mark.parametrize(
    "rule",
    [dc.CondConv(), dc.DyNetConv(), dc.ODConv(), dc.ODConv(num_kernels=2)],
    ids=["condconv", "dynet", "odconv", "two kernels"],
)
def test_kernels_with_more_and_with_fewer_channels_than_positions(rule, tmp_path, ort, trace_once) -> None:
    """Maps of 16 x 16, 8 x 8 and 4 x 4 with 16, 32 and 64 channels, of a size that is known."""
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, {r"re:.*\.conv\d$": rule})
    dc.dynamize_(model, dc.SpatialMasking())
    spread_routers(randomise_norms(model)).eval()
    given, path, size = MaskInputs(copy.deepcopy(model)).eval(), tmp_path / "m.onnx", (3, 16, 16)
    for lowering in ("sparse", "dense"):
        options = {"lowering": lowering, "dial": None, "report": (), "check": False}
        dc.export.onnx(given, example(model, 2, 0.5, size), path, **options)
        for n, density in CASES:
            inputs = example(model, n, density, size)
            agree(ort(path, *inputs)["output"], _eager(given, inputs))


def test_pointwise_kernels_of_each_image_find_rows_in_empty_lists(tmp_path, ort) -> None:
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    torch.manual_seed(0)
    model = dc.create_model("timm:mobilenetv2_035", num_classes=5)
    dc.dynamize_(model, (dc.SpatialMasking(), dc.CondConv(num_experts=2)))
    given, path, size = MaskInputs(model.eval()), tmp_path / "m.onnx", (3, 32, 32)
    options = {"lowering": "sparse", "dial": None, "report": (), "check": False}
    dc.export.onnx(given.eval(), example(model, 2, 0.5, size), path, **options)
    for n, density in CASES:
        inputs = example(model, n, density, size)
        agree(ort(path, *inputs)["output"], _eager(given, inputs))
        for mask in inputs[1:]:
            mask[0] = 0
        agree(ort(path, *inputs)["output"], _eager(given, inputs))


class Ending(nn.Module):
    """A block whose branch ends in an activation, which skips only where that works row by row."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.conv1, self.conv2, self.act = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1), act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.act(self.conv2(self.act(self.conv1(x))))


@pytest.mark.parametrize(
    "act",
    [nn.PReLU(8), nn.PReLU(), nn.SELU(), nn.CELU(0.5), nn.Softsign(), nn.LogSigmoid()],
    ids=["prelu", "one slope", "selu", "celu", "softsign", "logsigmoid"],
)
@pytest.mark.parametrize("outside", [False, True])
def test_activations_of_single_positions(act, outside, tmp_path, ort) -> None:
    torch.manual_seed(0)
    act = copy.deepcopy(act)
    for slopes in act.parameters():
        nn.init.normal_(slopes)
    # Behind a sparse block it works on that block's rows.
    parts = [nn.Conv2d(3, 8, 1), Ending(act), *([copy.deepcopy(act)] if outside else []), nn.Conv2d(8, 5, 1)]
    model = nn.Sequential(*parts)
    dc.dynamize_(model, dc.SpatialMasking())
    given, path = MaskInputs(copy.deepcopy(model)).eval(), tmp_path / "m.onnx"
    options = {"lowering": "sparse", "dial": None, "report": (), "check": False}
    done = dc.export.onnx(given, example(model, 2, 0.5), path, **options)
    assert set(done.blocks.values()) == {"sparse"}
    for n, density in CASES:
        inputs = example(model, n, density)
        agree(ort(path, *inputs)["output"], _eager(given, inputs))


def _eager(model: nn.Module, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(*inputs)


@pytest.mark.parametrize("options", [{"execution": "unfold"}, {"execution": "feature"}])
def test_how_layers_were_told_to_run_does_not_keep_them_from_skipping(options, tmp_path) -> None:
    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, (dc.SpatialMasking(), dc.DYConv(**options)))
    done = dc.export.onnx(model.eval(), (torch.randn(2, 3, 16, 16),), tmp_path / "m.onnx", lowering="sparse")
    assert set(done.blocks.values()) == {"sparse"} and done.error < 1e-4


@pytest.mark.parametrize("bins", [(2, 2), (3, 1)])
def test_adaptive_pools_follow_the_size(bins, tmp_path, ort) -> None:
    torch.manual_seed(0)
    parts = [
        nn.Conv2d(3, 4, 3),
        nn.AdaptiveAvgPool2d(bins),
        nn.Flatten(),
        nn.Linear(4 * bins[0] * bins[1], 5),
    ]
    model = nn.Sequential(*parts).eval()
    dc.export.onnx(model, (torch.randn(2, 3, 14, 14),), tmp_path / "m.onnx", dynamic_size=True)
    for size in ((14, 14), (13, 9), (20, 25)):
        x = torch.randn(2, 3, *size)
        agree(ort(tmp_path / "m.onnx", x)["output"], model(x).detach())


def test_dynamic_kernels(tmp_path, ort) -> None:
    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=5)
    places = [f"layer{stage}.0.conv{i}" for stage in (1, 2, 3) for i in (1, 2)]
    dc.dynamize_(model, {place: kind() for place, kind in zip(places, KERNELS.values(), strict=True)})
    model.eval()
    dc.export.onnx(model, (torch.randn(2, 3, 16, 16),), tmp_path / "m.onnx", check=False)
    for n in (1, 3, 8):
        x = torch.randn(n, 3, 16, 16)
        with torch.no_grad():
            agree(ort(tmp_path / "m.onnx", x)["output"], model(x))


@pytest.mark.parametrize("name", ["basic", "channels"])
def test_openvino_skips_too(name, tmp_path, trace_once) -> None:
    pytest.importorskip("openvino")
    from dynaconv.export.runtimes import load

    model, given = masked(name)
    path = tmp_path / "m.onnx"
    dc.export.onnx(given, example(model, 2, 0.5), path, lowering="sparse", dial=None, report=(), check=False)
    run = load("openvino", path, 1)
    for n, density in CASES:
        inputs = example(model, n, density)
        with torch.no_grad():
            agree(run(feed_of(inputs))["output"], given(*inputs))


def test_one_image_runs_dynamic_kernels_as_convolutions(tmp_path, ort) -> None:
    import onnx

    torch.manual_seed(0)
    model = dc.create_model("resnet8_cifar", num_classes=5)
    dc.dynamize_(model, {"layer3.0.conv2": dc.DYConv()})
    model.eval()
    x = torch.randn(1, 3, 16, 16)
    done = dc.export.onnx(model, (x,), tmp_path / "m.onnx", dynamic_batch=False)
    assert done.error < 1e-5 and done.inputs["images"] == [1, 3, 16, 16]
    convs = [n for n in onnx.load(tmp_path / "m.onnx").graph.node if n.op_type == "Conv"]
    # The stem, six in blocks, two projections: the dynamic one among them.
    assert len(convs) == 9
    agree(ort(tmp_path / "m.onnx", x)["output"], model(x).detach())
