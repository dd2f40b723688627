"""Every family of residual networks: converts, trains, skips exactly what the masked dense computation is, reverts."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from tests.convert.families import BLOCKS, FAMILIES, Stubborn, UserBlock
from tests.convert.networks import randomise_norms
from torch import Tensor, nn

import dynaconv as dc
from dynaconv.convert import HANDLERS, Refusal, recognise
from dynaconv.cost import count_dense
from dynaconv.nn import Anatomy, MaskedBlock, Step
from dynaconv.nn.block_program import macs_per_position
from dynaconv.testing import force_masks, random_mask

pytestmark = pytest.mark.needs("timm", "torchvision")


def lively(model: nn.Module) -> nn.Module:
    """Norms that would show a folding mistake, and layer scales and gains that start at nothing, drawn."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and float(parameter.std()) < 1e-4:
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    return randomise_norms(model)


def deviation(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape and bool(got.isfinite().all())
    return float((got - want).detach().abs().max() / want.detach().abs().max().clamp(min=1e-6))


def set_backend(model: nn.Module, backend: str, break_even: float | None = 2.0) -> None:
    for block in dc.masked_blocks(model).values():
        block.backend, block.break_even = backend, break_even


@pytest.mark.parametrize("family", FAMILIES)
def test_a_member_of_each_family(family: str) -> None:
    torch.manual_seed(0)
    build, side, blocks, chain = FAMILIES[family]
    model = lively(build()).eval()
    original, x = copy.deepcopy(model), torch.randn(2, 3, side, side)
    report = dc.dynamize_(model, input_size=(3, side, side))
    assert len(report.converted) == blocks
    kinds = {block.anatomy.is_chain for block in dc.masked_blocks(model).values()}
    assert kinds == ({True, False} if chain is None else {chain})

    with torch.no_grad():
        want = original(x)
        with force_masks(model, 1.0):
            set_backend(model, "auto")
            assert deviation(model(x), want) <= 1e-4
            profile = dc.profile(model, x)
            assert profile.conditional_ratio == pytest.approx(1.0)
            assert profile.dense_macs == count_dense(original, (3, side, side)).static
        with force_masks(model, 0.3):
            set_backend(model, "eager")
            masked = model(x)
            set_backend(model, "auto")
            assert deviation(model(x), masked) <= 1e-4
            assert deviation(masked, want) > 1e-3
            half = dc.profile(model, x)
            assert 0.25 <= half.conditional_ratio < 0.95

    model.train()
    budget = dc.MacBudget(model, 0.5, total_steps=4, input_size=(3, side, side))
    with budget.observe() as cost:
        loss = F.cross_entropy(model(x), torch.tensor([0, 1]))
    (loss + cost.loss).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or bool(parameter.grad.isfinite().all()), name
    assert all(any(p.grad.any() for p in gate.parameters()) for gate in dc.gates(model).values())

    assert dc.revert_(model) == report.converted
    restored = model.state_dict()
    assert list(restored) == list(original.state_dict())
    with torch.no_grad():
        model.load_state_dict(original.state_dict())
        assert deviation(model.eval()(x), want) <= 1e-6


def masked(name: str, dtype: torch.dtype = torch.float32) -> MaskedBlock:
    torch.manual_seed(0)
    holder = nn.Sequential(lively(BLOCKS[name]())).to(dtype)
    assert dc.dynamize_(holder, dc.SpatialMasking(preset="paper")).converted == ["0"]
    return holder[0]


def smooth(model: nn.Module) -> nn.Module:
    """SiLU for ReLU: no position is lost because an activation is zero there."""
    for module in model.modules():
        for key, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, key, nn.SiLU())
    return model


def fix(block: MaskedBlock, mask: Tensor) -> None:
    block.gate.register_forward_hook(lambda _gate, args, _y: mask[: len(args[0])])


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("size", [(9, 7), (6, 8)])
def test_skipping_equals_the_masked_dense_computation(name: str, size: tuple[int, int]) -> None:
    block = masked(name).eval()
    x = torch.randn(3, block.in_channels, *size)
    for density in (0.0, 0.15, 0.6, 1.0):
        mask = random_mask(3, block.gate_grid(size), density, seed=3)
        if 0 < density < 1:
            mask[1] = 0  # An image without any open position.
        block.gate._forward_hooks.clear()
        fix(block, mask)
        before = x.clone()
        want = block.dense_forward(x, mask)
        for block.break_even in (2.0, 0.0):
            with torch.no_grad():
                assert deviation(block(x), want) <= 1e-5, density
        assert torch.equal(x, before)


@pytest.mark.parametrize("name", BLOCKS)
def test_open_masks_are_the_original_block(name: str) -> None:
    block = masked(name)
    x = torch.randn(3, block.in_channels, 9, 7)
    mask = torch.ones(3, 1, *block.gate_grid((9, 7)))
    fix(block, mask)
    block.break_even = 2.0
    for mode in (False, True):
        plain = copy.deepcopy(block.block).train(mode)
        block.train(mode)
        block.gate.eval()  # Its noise would take part in what drop-path draws.
        torch.manual_seed(5)
        want = plain(x)
        torch.manual_seed(5)
        with torch.set_grad_enabled(mode):
            assert deviation(block(x), want) <= 1e-5
        for got, buffer in zip(block.block.buffers(), plain.buffers(), strict=True):
            assert torch.allclose(got, buffer)


@pytest.mark.parametrize("name", BLOCKS)
def test_closed_positions_are_never_read(name: str) -> None:
    """Poison everything outside of what the open positions need."""
    block = masked(name).eval()
    mask = torch.zeros(2, 1, *block.gate_grid((20, 18)))
    mask[..., 1, 2] = 1
    fix(block, mask)
    block.break_even = 2.0
    x = torch.randn(2, block.in_channels, 20, 18)
    with torch.no_grad():
        clean = block(x)[..., 1, 2]
        x[..., 14:, :] = float("nan")
        assert torch.equal(block(x)[..., 1, 2], clean)


@pytest.mark.parametrize("name", BLOCKS)
def test_executed_macs_against_brute_force(name: str) -> None:
    """A layer's output counts where some open output of the block feels it: asked of autograd, layer by layer."""
    torch.manual_seed(0)
    model = nn.Sequential(smooth(lively(BLOCKS[name]()))).double().eval()
    dc.dynamize_(model, input_size=(8, 9, 7))
    block, size = model[0], (9, 7)
    mask = random_mask(2, block.gate_grid(size), 0.12, seed=5).double()
    assert mask.sum() > 0
    fix(block, mask)
    x = torch.randn(2, block.in_channels, *size, dtype=torch.float64)
    program, felt, handles = block.anatomy.program, {}, []
    for op in program.convolutions:
        if op.call != "module":
            continue

        def spread(_layer: nn.Module, _args: tuple, y: Tensor, name: str = op.name, axes=op.layout) -> Tensor:
            shape = [y.shape[i] if i in (0, *axes) else 1 for i in range(4)]
            felt[name] = torch.zeros(shape, dtype=y.dtype, requires_grad=True)
            return y * (1 + felt[name])

        handles.append(block.inner.get_submodule(op.target).register_forward_hook(spread))
    y = block.dense_forward(x, mask)
    (torch.randn_like(y) * mask * y).sum().backward()
    for handle in handles:
        handle.remove()
    want = torch.zeros(2, dtype=torch.float64)
    for op in program.convolutions:
        if op.name in felt:
            positions = (felt[op.name].grad.abs() > 0).flatten(1).sum(1)
            want += positions * macs_per_position(op, block.inner)
        else:
            want += (
                mask.flatten(1).sum(1) * op.weights
            )  # A blur is the last window: it runs where the mask is open.
    blur_before_conv = name == "blurred"
    fixed = count_dense(model, (block.in_channels, *size))
    inside = {f"0.{path}" for path in block.conv_paths}
    want += sum(v for k, v in fixed.convs.items() if k not in inside)
    got = dc.profile(model, x).executed_macs
    if blur_before_conv:
        # conv1 - blur (stride 2) - conv2: the blur runs where conv2 reads.
        needs = dict(zip(block.conv_paths, block.needs(mask, size), strict=True))
        blur = next(op for op in program.convolutions if op.call != "module")
        want += (needs["block.aa"].flatten(1).sum(1) - mask.flatten(1).sum(1)) * blur.weights
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", BLOCKS)
def test_gradients_of_the_training_path(name: str) -> None:
    block = masked(name, torch.float64).train()
    for module in block.modules():
        if type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    size = (4, 5)
    mask = random_mask(2, block.gate_grid(size), 0.5, seed=1).double()
    x = torch.randn(2, block.in_channels, *size, dtype=torch.float64, requires_grad=True)
    parameters = {k: v for k, v in block.inner.named_parameters() if v.numel() <= 40}
    buffers = {k: v.clone() for k, v in block.inner.named_buffers()}

    def forward(x: Tensor, *values: Tensor) -> Tensor:
        # Batch statistics are what training normalises by; the running ones must not drift between the trials.
        for key, buffer in block.inner.named_buffers():
            buffer.data.copy_(buffers[key])
        changed = {f"block.{k}": v for k, v in zip(parameters, values, strict=True)}
        return torch.func.functional_call(
            _Dense(block), {f"inner.{k}": v for k, v in changed.items()}, (x, mask)
        )

    inputs = (x, *(v.detach().clone().requires_grad_() for v in parameters.values()))
    assert torch.autograd.gradcheck(forward, inputs, fast_mode=True)


class _Dense(nn.Module):
    def __init__(self, inner: MaskedBlock) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.inner.dense_forward(x, mask)


def test_squeeze_excite_pools_over_open_positions() -> None:
    block = masked("inverted with se").eval()
    x = torch.randn(1, 6, 7, 6)
    mask = random_mask(1, (7, 6), 0.4)
    seen = {}
    block.inner.se.conv_reduce.register_forward_hook(lambda _m, args, _y: seen.update(pooled=args[0]))
    captured = {}
    block.inner.bn2.register_forward_hook(lambda _m, _a, y: captured.update(map=y))
    with torch.no_grad():
        block.dense_forward(x, mask)
        hidden = captured["map"][0].flatten(1)
        assert torch.allclose(seen["pooled"].flatten(), hidden[:, mask.flatten() > 0].mean(1), atol=1e-6)
        dense = seen["pooled"].clone()
        fix(block, mask)
        block.break_even = 2.0
        block(x)
        assert torch.allclose(seen["pooled"], dense, atol=1e-6)


@pytest.mark.parametrize("name", ["inverted with se", "convnext", "shuffle", "convnext with grn"])
def test_copies_pickles_compiles_and_exports(name: str) -> None:
    torch._dynamo.reset()
    block = masked(name).eval()
    x = torch.randn(3, block.in_channels, 8, 8)
    with torch.no_grad():
        want = block(x)
        assert torch.equal(copy.deepcopy(block)(x), want)
        assert torch.equal(pickle.loads(pickle.dumps(block))(x), want)
        compiled = torch.compile(block, fullgraph=True, backend="eager")
        assert deviation(compiled(x), want) <= 1e-4
        program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},), strict=False)
        other = torch.randn(2, block.in_channels, 8, 8)
        assert deviation(program.module()(other), block(other)) <= 1e-4


# torch's own tracer instantiates autograd functions, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_training_graph_compiles_as_one() -> None:
    torch._dynamo.reset()
    block = masked("bottleneck with se").train()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    y = compiled(torch.randn(3, 8, 8, 8))
    y.sum().backward()
    assert all(p.grad is not None for p in block.block.parameters())


def test_an_explicit_backend_says_why_it_cannot_skip() -> None:
    block = masked("inverted with se").eval()
    block.backend = "cpu"
    x = torch.randn(1, 6, 8, 8)
    with pytest.raises(RuntimeError, match="without gradients; use torch.no_grad"):
        block(x)
    with torch.no_grad():
        block(x)


class RunsTwice(UserBlock):
    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return x + self.second(self.first(x))


class Normalised(UserBlock):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, 10)


class FunctionalDropout(UserBlock):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.dropout(self.second(self.first(x)), training=self.training)


class WritesItsInput(UserBlock):
    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(F.relu_(x)))
        return x + y


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        flat = self.conv(x).flatten(2)
        weight = (flat.transpose(1, 2) @ flat).softmax(-1)
        return x + (flat @ weight).view_as(x)


REFUSED = {
    RunsTwice: "its first runs inside and outside of the branch",
    Normalised: r"norm \(GroupNorm\) mixes positions",
    FunctionalDropout: "differs between training and evaluation",
    WritesItsInput: r"relu_\(\) changes a map that something else reads",
    Attends: r"flatten\(\)|transpose\(\)|softmax|mixes positions",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_with_the_reason(kind: type[nn.Module]) -> None:
    import re

    model = nn.Sequential(UserBlock(), kind())
    before, keys = copy.deepcopy(model.state_dict()), list(vars(model[1]))
    report = dc.dynamize_(model, input_size=(6, 8, 8))
    assert report.converted == ["0"]
    assert re.search(REFUSED[kind], report.skipped["1"]), report.skipped
    assert list(vars(model[1])) == keys and model[1].training
    dc.revert_(model)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_what_cannot_be_traced_may_say_its_anatomy_or_be_registered() -> None:
    model = nn.Sequential(UserBlock(), Stubborn(), Stubborn(says=False))
    report = dc.dynamize_(model, input_size=(6, 8, 8))
    assert report.converted == ["0", "1"]
    assert "cannot be traced" in report.skipped["2"] and "HANDLERS" in report.skipped["2"]
    dc.revert_(model)

    def handler(block: nn.Module) -> Anatomy | Refusal | None:
        if type(block) is not Stubborn:
            return None
        return Anatomy("mine", (Step("conv1", "bn1", "relu"), Step("conv2")), act="relu")

    HANDLERS.append(handler)
    try:
        report = dc.dynamize_(model, input_size=(6, 8, 8))
    finally:
        HANDLERS.remove(handler)
    assert report.converted == ["0", "1", "2"]
    x = torch.randn(2, 6, 8, 8)
    model.eval()
    with torch.no_grad(), force_masks(model, 0.4):
        set_backend(model, "eager")
        want = model(x)
        set_backend(model, "auto")
        assert deviation(model(x), want) <= 1e-5


def test_plain_modules_are_no_blocks() -> None:
    for module in (nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()), nn.Conv2d(3, 3, 1), dc.nn.MaskUnit(4)):
        assert recognise(module) is None


@pytest.mark.parametrize("name", ["inverted with se", "convnext", "bottleneck with se"])
@pytest.mark.parametrize(
    "config", [dc.CondConv(num_experts=2), dc.ODConv(num_kernels=2)], ids=["condconv", "odconv"]
)
def test_dynamic_kernels_in_the_same_block(name: str, config: dc.CondConv | dc.ODConv) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(lively(BLOCKS[name]()))
    dc.dynamize_(model, {"0": (dc.SpatialMasking(), config)}, input_size=(8, 9, 7))
    block = model.eval()[0]
    assert block.dynamic
    x = torch.randn(3, block.in_channels, 9, 7)
    mask = random_mask(3, block.gate_grid((9, 7)), 0.4)
    fix(block, mask)
    block.break_even = 2.0
    with torch.no_grad():
        assert deviation(block(x), block.dense_forward(x, mask)) <= 1e-5
