"""Kernels per sample under torch.compile, torch.export, ONNX, autocast, DDP and copies, layer by layer and in networks.

Compilation and export of DCD, ODConv and WeightNet: test_layers_trace.py.
"""

from __future__ import annotations

import copy
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.export import Dim

import dynaconv as dc
from dynaconv.nn import (
    CondConv1d,
    CondConv2d,
    CondConv3d,
    CondLinear,
    DCDConv2d,
    DCDLinear,
    DYConv1d,
    DYConv2d,
    DynamicConv,
    DyNetConv2d,
    ODConv2d,
    RoutedBlock,
    WeightNetConv2d,
    set_temperature,
)
from dynaconv.nn.routers import ChannelRouter, Router, SigmoidRouter


class Network(nn.Module):
    """A stem, a block with one router for its layers, layers with their own, and a dynamic classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        block = dc.models.BasicBlock(8, 8)
        for name in ("conv1", "conv2"):
            setattr(block, name, CondConv2d.from_conv(getattr(block, name), num_experts=3, router=False))
        self.block = RoutedBlock(block, SigmoidRouter(8, 3), ["conv1", "conv2"])
        self.body = nn.Sequential(DYConv2d(8, 8, 3, 2, 1), nn.ReLU(), DyNetConv2d(8, 8, 1, group_size=2))
        self.fc = CondLinear(8, 5, num_experts=2, static_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.body(self.block(self.stem(x))).mean((2, 3)))


def split_block() -> RoutedBlock:
    """DyNet's predictor, whose output is cut into a piece for each layer."""
    block = nn.Sequential(
        DyNetConv2d(8, 12, 3, 2, 1, groups=2, group_size=2, router=False),
        nn.ReLU(),
        DyNetConv2d(12, 8, 1, group_size=2, router=False),
    )
    return RoutedBlock(block, ChannelRouter(8, [12, 8], 2, 4), ["0", "2"])


def converted(config: object) -> nn.Module:
    """A residual network of one block: every stride more makes torch.compile think for seconds."""
    model = dc.models.CifarResNet(8, width=8, image_size=12)
    model.conv1, model.layer1 = nn.Conv2d(8, 8, 3, padding=1, bias=False), model.layer2
    model.layer2, model.layer3, model.fc = nn.Identity(), nn.Identity(), nn.Linear(16, 5)
    dc.dynamize_(model, config, input_size=(8, 9, 7))
    return model


MIXTURES = {
    "condconv 3x3": lambda: CondConv2d(8, 6, 3, 2, 1, num_experts=3),
    "condconv 1x1": lambda: CondConv2d(8, 6, 1, 2, num_experts=3),
    "condconv 3d": lambda: nn.Sequential(
        nn.Unflatten(1, (4, 2)), CondConv3d(4, 2, (2, 3, 3), padding="same")
    ),
    "condconv classifier": lambda: nn.Sequential(
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), CondLinear(8, 5, True)
    ),
    "dyconv 3x3 circular": lambda: DYConv2d(8, 6, 3, padding=1, padding_mode="circular"),
    "dyconv depthwise": lambda: DYConv2d(8, 8, 3, padding=1, groups=8),
    "dyconv depthwise, many kernels": lambda: DYConv2d(8, 8, 3, padding=1, groups=8, num_kernels=9),
    "dyconv 1d": lambda: nn.Sequential(nn.Flatten(2), DYConv1d(8, 6, 5, 2, "valid")),
    "dynet grouped": lambda: DyNetConv2d(8, 12, 3, 2, 1, groups=2, group_size=3),
    "dynet 1x1": lambda: DyNetConv2d(8, 6, 1, hidden=4),
    "condconv 1d": lambda: nn.Sequential(nn.Flatten(2), CondConv1d(8, 6, 3, dilation=2, padding=2)),
}
NETWORKS = {
    "predictor of a block": split_block,
    "network": Network,
    "converted, CondConv": lambda: converted(dc.CondConv(num_experts=2)),
    "converted, WeightNet": lambda: converted(dc.WeightNetConv()),
}
OTHERS = {
    "dcd factored": lambda: DCDConv2d(8, 8, 3, 2, 1, form="factored"),
    "dcd folded": lambda: DCDConv2d(8, 8, 3, 2, 1, form="folded"),
    "dcd 1x1": lambda: DCDConv2d(8, 8, 1, form="folded", rule="resnet_bottleneck"),
    "dcd depthwise": lambda: DCDConv2d(8, 8, 3, 2, 1, groups=8),
    "dcd classifier": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), DCDLinear(8, 5)),
    "odconv": lambda: ODConv2d(8, 8, 3, padding="same", num_kernels=4),
    "odconv, one kernel": lambda: ODConv2d(8, 8, 3, 2, 1),
    "odconv 1x1": lambda: ODConv2d(8, 8, 1, num_kernels=2, norm="layer"),
    "odconv depthwise": lambda: ODConv2d(8, 8, 3, padding=1, groups=8, num_kernels=2),
    "weightnet": lambda: WeightNetConv2d(8, 8, 3, padding=1),
    "weightnet depthwise": lambda: WeightNetConv2d(8, 8, 3, padding=1, groups=8),
}
MADE = {**MIXTURES, **NETWORKS, **OTHERS}


def make(name: str) -> nn.Module:
    """With routers that tell images apart."""
    torch.manual_seed(0)
    model = MADE[name]()
    for module in model.modules():
        if isinstance(module, Router):
            for parameter in module.parameters():
                nn.init.normal_(parameter, 0.0, 0.5)
    return model


def images(batch: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, 8, 9, 7, generator=torch.Generator().manual_seed(seed)) + 0.3


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * float(
        want.detach().abs().max().clamp(min=1e-6)
    )


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", [n for n in (*MIXTURES, *NETWORKS) if n != "converted, CondConv"])
def test_compiles_to_one_graph_for_all_batch_sizes(name: str) -> None:
    model = make(name).eval()
    eager, counter, counts = copy.deepcopy(model), CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for batch in (3, 5, 8):
            close(compiled(images(batch)), eager(images(batch)))
            counts.append(counter.frame_count)
        assert len(set(counts)) == 1
        close(compiled(images(1)), eager(images(1)))


@pytest.mark.parametrize("name", [n for n in (*MIXTURES, *NETWORKS) if n != "converted, WeightNet"])
def test_compiles_for_training(name: str) -> None:
    model = make(name).train()
    eager, counter, counts = copy.deepcopy(model), CompileCounterWithBackend("aot_eager"), []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    steps = {m: torch.optim.SGD(m.parameters(), 1e-3) for m in (model, eager)}
    for batch in (3, 5, 8):
        for run, owner in ((compiled, model), (eager, eager)):
            steps[owner].zero_grad()
            run(images(batch)).square().sum().backward()
        for p, q in zip(model.parameters(), eager.parameters(), strict=True):
            close(p.grad, q.grad, 1e-4)
        for optimizer in steps.values():
            optimizer.step()
        counts.append(counter.frame_count)
    assert len(set(counts)) == 1
    for value, other in zip(model.state_dict().values(), eager.state_dict().values(), strict=True):
        close(value.float(), other.float(), 1e-4)


@pytest.mark.skipif(
    shutil.which("g++") is None, reason="the default compiler of torch.compile needs a C++ compiler"
)
def test_the_default_compiler_runs_it() -> None:
    model = make("condconv 3x3")
    eager = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    for batch in (3, 8):
        got, want = compiled(images(batch)), eager(images(batch))
        close(got, want, 1e-4)
    got.square().sum().backward()
    want.square().sum().backward()
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        close(p.grad, q.grad, 1e-4)


def test_a_new_temperature_needs_no_new_graph() -> None:
    model = make("dyconv 3x3 circular").eval()
    counter, counts, seen = CompileCounterWithBackend("aot_eager"), [], []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    with torch.no_grad():
        for temperature in (30.0, 7.0, 1.0):
            set_temperature(model, temperature)
            seen.append(compiled(images(3)))
            close(seen[-1], model(images(3)))
            counts.append(counter.frame_count)
    assert len(set(counts)) == 1 and not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", [*MIXTURES, *NETWORKS])
def test_exports_with_dynamic_batch(name: str) -> None:
    model = make(name).eval()
    program = torch.export.export(model, (images(2),), dynamic_shapes=({0: Dim("batch")},)).module()
    for batch in (1, 3, 8):
        close(program(images(batch)), model(images(batch)))


# Inside torch's exporter, which copies tree specs.
copies_specs = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)


@copies_specs
@pytest.mark.needs("onnx", "onnxscript", "onnxruntime")
@pytest.mark.parametrize("name", MADE)
def test_runs_in_onnx_runtime_at_any_batch_size(name: str) -> None:
    import onnxruntime

    model = make(name).eval()
    program = torch.onnx.export(
        model, (images(2),), dynamo=True, dynamic_shapes=({0: Dim("batch")},), verbose=False
    )
    stored = io.BytesIO()
    program.save(stored)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(stored.getvalue(), options, providers=["CPUExecutionProvider"])
    (argument,) = session.get_inputs()
    for batch in (1, 3, 8):
        (got,) = session.run(None, {argument.name: images(batch).numpy()})
        close(torch.from_numpy(got), model(images(batch)), 1e-4)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("training", [False, True])
def test_autocast_decides_in_full_precision(name: str, training: bool) -> None:
    """Coefficients in float32 from what the layer is given, at a high temperature too; gradients in float32."""
    model = make(name).train(training)
    set_temperature(model, 30.0)
    seen = []

    def check(router: Router, args: tuple, output: Tensor | tuple[Tensor, ...]) -> None:
        again = copy.deepcopy(router)
        again._forward_hooks.clear()
        parts = output if isinstance(output, tuple) else (output,)
        with torch.autocast("cpu", enabled=False):
            want = again(*(a.float() if isinstance(a, Tensor) else a for a in args))
        for part, exact in zip(parts, want if isinstance(want, tuple) else (want,), strict=True):
            assert part.dtype == torch.float32
            close(part, exact, 1e-5)
        seen.append(router)

    for router in [m for m in model.modules() if isinstance(m, Router)]:
        router.register_forward_hook(check)
    exact = copy.deepcopy(model)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(images(3))
    assert seen and y.dtype == torch.bfloat16
    close(y.float(), exact(images(3)), 0.1)
    if training:
        y.float().square().sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad.dtype == torch.float32 and bool(parameter.grad.isfinite().all()), key


@pytest.mark.parametrize("name", MADE)
def test_a_network_in_half_precision_runs(name: str) -> None:
    model = make(name).eval()
    want = model(images(3))
    y = copy.deepcopy(model).bfloat16()(images(3).bfloat16())
    assert y.dtype == torch.bfloat16
    close(y.float(), want, 0.1)


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_autocast_of_a_network_in_another_precision(name: str, dtype: torch.dtype) -> None:
    model = make(name).eval()
    want = model(images(3))
    with torch.autocast("cpu", torch.bfloat16):
        y = copy.deepcopy(model).to(dtype)(images(3).to(dtype))
    close(y.float(), want, 0.1)


@pytest.mark.parametrize("name", MADE)
def test_an_empty_batch(name: str) -> None:
    model = make(name)
    shape = model.eval()(images(3)).shape[1:]
    assert model(images(0)).shape == (0, *shape)
    # Batch norm in training has nothing to normalise by, and says so itself.
    if not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
        model.train()(images(0)).sum().backward()
        assert all(p.grad is not None and not bool(p.grad.any()) for p in model.parameters())


@pytest.mark.parametrize("name", MADE)
def test_copies_and_states(name: str, tmp_path: Path) -> None:
    model = make(name).eval()
    want = model(images(3))
    copied = copy.deepcopy(model)
    assert torch.equal(copied(images(3)), want)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert torch.equal(model(images(3)), want)
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.manual_seed(5)
    other = MADE[name]().eval()
    assert not torch.equal(other(images(3)), want)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(other(images(3)), want)


@pytest.mark.parametrize(
    "name", [n for n in MADE if "1d" not in n and "3d" not in n and "classifier" not in n]
)
@pytest.mark.parametrize("training", [False, True])
def test_channels_last_stays(name: str, training: bool) -> None:
    model = make(name).train(training)
    want = copy.deepcopy(model)(images(3))
    for moved in (False, True):
        other = copy.deepcopy(model)
        other = other.to(memory_format=torch.channels_last) if moved else other
        y = other(images(3).contiguous(memory_format=torch.channels_last))
        close(y, want)
        if y.dim() == 4:
            assert y.is_contiguous(memory_format=torch.channels_last)
        y.square().sum().backward()
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in other.parameters())


SCRIPT = """
import copy, json, os, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tests.nn.test_kernel_tracing import images, make

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, facts = dist.get_rank(), {}
for name in sys.argv[2:]:
    # Evaluation mode: batch norm by running statistics, so that one process can compute the same.
    model = make(name).eval()
    alone, x = copy.deepcopy(model), images(4)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(ddp.parameters(), 0.01)
    for step in range(2):
        optimizer.zero_grad()
        ddp(x[2 * rank : 2 * rank + 2]).square().mean().backward()
        if step == 0:
            alone(x).square().mean().backward()
            pairs = list(zip(model.parameters(), alone.parameters(), strict=True))
            worst = max(float((p.grad - q.grad).abs().max() / q.grad.abs().max().clamp(min=1e-6)) for p, q in pairs)
        optimizer.step()
    total = sum(float(p.double().sum()) for p in model.parameters())
    facts[name] = {"worst": worst, "total": total}
with open(f"{sys.argv[1]}/rank{rank}.json", "w") as file:
    json.dump(facts, file)
dist.barrier()
# A thread of the process group that meets an interpreter on its way out aborts the process now and then.
os._exit(0)
"""


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    names = ["network", "predictor of a block", "dcd factored", "dcd classifier", "odconv", "weightnet"]
    root, script = Path(__file__).resolve().parents[2], tmp_path / "script.py"
    script.write_text(SCRIPT)
    paths = [str(root), str(root / "src"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launch, script, tmp_path, *names], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    for name in names:
        assert one[name]["worst"] < 1e-4 and two[name]["worst"] < 1e-4, name
        assert one[name]["total"] == two[name]["total"]


def test_every_layer_is_traced() -> None:
    kinds = {type(m) for name in MADE for m in make(name).modules() if isinstance(m, DynamicConv)}
    assert {k.__name__ for k in kinds} >= {
        "CondConv1d", "CondConv2d", "CondConv3d", "DYConv1d", "DYConv2d", "DyNetConv2d", "DCDConv2d", "ODConv2d",
        "WeightNetConv2d",
    }  # fmt: skip
