"""The operators as torch sees them: registered right, one node in every graph, the same without the kernels."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

import dynaconv as dc
from dynaconv import ops
from dynaconv.nn import CondConv2d, MaskedConv2d, MaskUnit
from dynaconv.ops import ConvSpec, PackedBranch
from dynaconv.ops.dynamic_conv2d.compiled import PackedExperts
from dynaconv.testing import force_masks, random_mask

# Inside torch's exporter, which copies tree specs.
copies_specs = pytest.mark.filterwarnings(
    "ignore:`isinstance.treespec, LeafSpec.` is deprecated:FutureWarning"
)

needs_kernels = pytest.mark.skipif(
    ops._native.missing() is not None, reason="the compiled kernels are not built"
)
NAMES = ("dynamic_conv2d", "mask_logits", "masked_conv2d", "masked_mean", "masked_residual")


def op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.dynaconv, name).default


def drawn(*shape: int, seed: int = 0, **options: object) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def masked_conv(n: int = 2, size: tuple[int, int] = (9, 7), groups: int = 1, **options) -> tuple:
    x, weight = drawn(n, 4, *size, **options), drawn(6, 4 // groups, 3, 3, seed=1, **options)
    out = tuple((s - 1) // 2 + 1 for s in size)
    return x, random_mask(n, out, 0.4), weight, drawn(6, seed=2, **options), (2, 2), (1, 1), (1, 1), groups


def masked_branch(n: int = 2, size: tuple[int, int] = (9, 7), break_even: float = 2.0, **options) -> tuple:
    weights = [drawn(5, 4, 3, 3, seed=1, **options), drawn(4, 5, 1, 1, seed=2, **options)]
    biases = [drawn(5, seed=3, **options), drawn(4, seed=5, **options)]
    x, mask = drawn(n, 4, *size, **options), random_mask(n, size, 0.4)
    numbers = [1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1], [1, 0], 1
    return x, mask, drawn(n, 4, *size, seed=4, **options), weights, biases, *numbers, break_even, None


def averaged(n: int = 2, size: tuple[int, int] = (9, 7), **options) -> tuple:
    return drawn(n, 5, *size, **options), random_mask(n, size, 0.4)


def logits(n: int = 2, size: tuple[int, int] = (9, 7), **options) -> tuple:
    x, weight = drawn(n, 5, *size, **options), drawn(1, 5, 3, 3, seed=1, **options)
    return x, weight, drawn(1, 5, seed=2, **options), drawn(1, seed=3, **options), 2


def mixture(
    n: int = 2,
    size: tuple[int, int] = (9, 7),
    groups: int = 1,
    each: bool = False,
    packed: bool = False,
    **options,
) -> tuple:
    x, experts = drawn(n, 4, *size, **options), drawn(3, 8, 4 // groups, 3, 3, seed=1, **options)
    routing = drawn(n, 8, 3, seed=2, **options) if each else drawn(n, 3, seed=2, **options)
    biases = drawn(3, 8, seed=3, **options), drawn(8, seed=4, **options)
    panels = PackedExperts().panels(experts) if packed and not ops._native.missing() else None
    taps = drawn(n, 9, seed=5, **options)
    return x, experts, routing, *biases, taps, (1, 1), (1, 1), (1, 1), groups, panels


SAMPLES = {
    "masked_conv2d": [masked_conv(), masked_conv(groups=2), masked_conv(dtype=torch.float64)],
    "masked_residual": [masked_branch(), masked_branch(break_even=0.0), masked_branch(dtype=torch.float64)],
    "masked_mean": [averaged(), averaged(dtype=torch.float64)],
    "mask_logits": [logits(), logits(dtype=torch.float64)],
    "dynamic_conv2d": [
        mixture(), mixture(packed=True), mixture(each=True, packed=True), mixture(groups=2),
        mixture(dtype=torch.float64),
        (drawn(2, 3, 7), drawn(2, 4, 3, 3), drawn(2, 2), None, None, None, [2], [1], [1], 1),
    ],
}  # fmt: skip
CASES = [(name, i) for name in NAMES for i in range(len(SAMPLES[name]))]


def tensors(args: tuple) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def with_gradients(args: tuple) -> tuple:
    def leaf(value: object) -> object:
        if isinstance(value, list):
            return [leaf(v) for v in value]
        return value.clone().requires_grad_() if isinstance(value, Tensor) else value

    # A packed copy of the weights carries no gradient.
    return tuple(a if i == 10 else leaf(a) for i, a in enumerate(args))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * max(1.0, float(want.detach().abs().max()))


@pytest.mark.parametrize(("name", "sample"), CASES)
def test_registered_as_torch_wants_it(name: str, sample: int) -> None:
    opcheck(op(name), with_gradients(SAMPLES[name][sample]))


@pytest.mark.parametrize(("name", "sample"), CASES)
@pytest.mark.parametrize("rows", [False, True])
def test_equal_to_the_definition(name: str, sample: int, rows: bool) -> None:
    """Value, memory format and gradients; without the kernels the definition is all there is."""
    args = SAMPLES[name][sample]
    if rows and args[0].dim() == 4:
        args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    definition = ops.decompositions()[op(name)]
    got, want = op(name)(*args), definition(*args)
    close(got, want)
    steps = [[y.stride(i) for i, size in enumerate(y.shape) if size > 1] for y in (got, want)]
    assert steps[0] == steps[1]
    close(getattr(torch.ops.dynaconv, name).eager(*args), want)
    leaves, others = with_gradients(args), with_gradients(args)
    op(name)(*leaves).square().sum().backward()
    definition(*others).square().sum().backward()
    for mine, other in zip(tensors(leaves), tensors(others), strict=True):
        if mine.requires_grad:
            close(mine.grad, other.grad, 1e-4)


def functions() -> dict:
    weight, conv = drawn(6, 4, 3, 3, seed=1), drawn(4, 4, 3, 3, seed=1)
    branch = PackedBranch.of([ConvSpec(conv, None, (1, 1), (1, 1), (1, 1), 1, "relu")], "relu")
    experts, line = drawn(3, 6, 4, 3, 3, seed=1), drawn(1, 4, 3, 3, seed=1)
    return {
        "masked_conv2d": lambda x, mask: ops.masked_conv2d(x, mask, weight, padding=1),
        "masked_residual": lambda x, mask: ops.masked_residual(x, mask, x, branch),
        "masked_mean": ops.masked_mean,
        "mask_logits": lambda x, mask: ops.mask_logits(x, line, line[:, :, 1, 1], mask.new_ones(1)) * mask,
        "dynamic_conv2d": lambda x, mask: ops.dynamic_conv2d(x, experts, mask.flatten(1)[:, :3], padding=1),
    }


def nodes(graph: torch.fx.Graph) -> list[str]:
    names = [str(n.target) for n in graph.nodes if n.op == "call_function"]
    return [n.split(".")[1] for n in names if n.startswith("dynaconv.")]


class _Module(torch.nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.function(x, mask)


@pytest.mark.parametrize("name", NAMES)
def test_one_node_for_compilers_at_two_shapes(name: str) -> None:
    torch._dynamo.reset()
    function, seen = functions()[name], []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        seen.append(nodes(module.graph))
        return module.forward

    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for n, size in ((2, (6, 5)), (3, (9, 8))):
        x, mask = drawn(n, 4, *size), random_mask(n, size, 0.4)
        close(compiled(x, mask), function(x, mask))
    assert seen and all(found == [name] for found in seen)


@copies_specs
@pytest.mark.parametrize("name", NAMES)
def test_one_node_for_exporters_at_any_batch_and_size(name: str) -> None:
    function = functions()[name]
    axes = {0: Dim("batch", min=1, max=64), 2: Dim("height", min=4, max=64), 3: Dim("width", min=4, max=64)}
    program = torch.export.export(
        _Module(function), (drawn(2, 4, 6, 5), random_mask(2, (6, 5), 0.4)), dynamic_shapes=(axes, axes),
    )  # fmt: skip
    assert nodes(program.graph) == [name]
    written_out = program.run_decompositions(ops.decompositions())
    assert nodes(written_out.graph) == []
    for n, size in ((1, (4, 4)), (3, (9, 8))):
        x, mask = drawn(n, 4, *size), random_mask(n, size, 0.4)
        for module in (program.module(), written_out.module()):
            close(module(x, mask), function(x, mask))


@copies_specs
def test_layers_are_one_node_in_evaluation_and_open_in_training() -> None:
    layer, x = CondConv2d(4, 6, 3, padding=1, num_experts=3), drawn(2, 4, 6, 5)
    in_training = torch.export.export(layer.train(), (x,))
    program = torch.export.export(layer.eval(), (x,))
    assert nodes(in_training.graph) == [] and nodes(program.graph) == ["dynamic_conv2d"]
    assert "aten.bmm.default" in str(program.run_decompositions(ops.decompositions()).graph)
    assert nodes(program.run_decompositions().graph) == ["dynamic_conv2d"]
    layer.execution = "unfold"
    assert nodes(torch.export.export(layer, (x,)).graph) == []
    masked, mask = MaskedConv2d(4, 6, 3, padding=1), random_mask(2, (6, 5), 0.4)
    assert nodes(torch.export.export(masked.eval(), (x, mask)).graph) == ["masked_conv2d"]
    assert nodes(torch.export.export(masked.train(), (x, mask)).graph) == []


def test_a_compiled_layer_in_evaluation_still_has_gradients() -> None:
    torch._dynamo.reset()
    layer = CondConv2d(4, 6, 3, padding=1, num_experts=3).eval()
    compiled, grads = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    for run in (layer, compiled):
        layer.zero_grad()
        run(drawn(2, 4, 6, 5)).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for mine, other in zip(*grads, strict=True):
        close(mine, other, 1e-4)


def test_autocast_goes_around_the_operators() -> None:
    torch._dynamo.reset()
    layer, x = CondConv2d(4, 6, 3, padding=1, num_experts=3).eval(), drawn(2, 4, 6, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, want = compiled(x), layer(x)
    assert y.dtype == want.dtype == torch.bfloat16
    close(y.float(), want.float(), 0.02)


MACS = {
    "masked_conv2d": 2 * 5 * 4 * 6 * 4 * 9,
    "masked_residual": 2 * 63 * (5 * 4 * 9 + 4 * 5),
    "masked_mean": 0,
    "mask_logits": 2 * (5 * 4 * 45 + 5),
    "dynamic_conv2d": 2 * (63 * 8 * 4 * 9 + 3 * 8 * 4 * 9),
}


@pytest.mark.parametrize("name", NAMES)
def test_counters_count_every_position(name: str) -> None:
    with FlopCounterMode(display=False) as counter:
        op(name)(*SAMPLES[name][0])
    assert counter.get_total_flops() == 2 * MACS[name]


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch(name: str) -> None:
    full = SAMPLES[name][0]
    each_image = {"masked_conv2d": 2, "masked_mean": 2, "masked_residual": 3, "mask_logits": 1}.get(name)
    args = tuple(
        a[:0] if i < each_image else a for i, a in enumerate(full)
    ) if each_image else (full[0][:0], full[1], full[2][:0], *full[3:5], full[5][:0], *full[6:])  # fmt: skip
    assert op(name)(*args).shape[0] == 0 == op(name)(*args).numel()


REFUSED = {
    "masked_conv2d": [
        (1, torch.ones(2, 1, 4, 4), "mask must be"), (2, torch.ones(6, 3, 3, 3), "channels"),
        (2, torch.ones(6, 4, 15, 3), "larger than the padded"), (3, torch.ones(5), "bias"),
        (4, (0, 1), "positive"), (7, 3, "channels"),
    ],
    "masked_residual": [
        (1, torch.ones(2, 1, 9, 6), "mask must be"), (2, torch.ones(2, 4, 9, 6), "shortcut must be"),
        (3, [torch.ones(5, 4, 3, 3)], "each convolution"), (4, [torch.ones(4), torch.ones(4)], "bias"),
        (5, [1, 1], "two numbers"),
        (3, [torch.ones(5, 4, 3, 3), torch.ones(4, 6, 1, 1)], "follow each other"),
    ],
    "masked_mean": [],
    "mask_logits": [(1, torch.ones(1, 4, 3, 3), "channels"), (2, torch.ones(1, 4), "linear"), (4, 0, "stride")],
    "dynamic_conv2d": [
        (2, torch.ones(2, 4), "routing"), (1, torch.ones(3, 8, 3, 3, 3), "channels"), (3, torch.ones(3, 7), "bias"),
        (4, torch.ones(7), "static_bias"), (5, torch.ones(2, 8), "taps"), (10, torch.ones(7), "packed"),
    ],
}  # fmt: skip


@needs_kernels
@pytest.mark.parametrize(("name", "case"), [(n, i) for n in NAMES for i in range(len(REFUSED[n]))])
def test_the_kernels_refuse_what_does_not_fit(name: str, case: int) -> None:
    args = list(mixture(packed=True) if name == "dynamic_conv2d" else SAMPLES[name][0])
    place, value, words = REFUSED[name][case]
    args[place] = value
    with pytest.raises(RuntimeError, match=words):
        op(name)(*args)


WITHOUT = """
import torch
from dynaconv import ops
from tests.ops.test_registry import NAMES, SAMPLES, close, functions, nodes, op
assert "switches" in ops._native.missing()
for name in NAMES:
    for args in SAMPLES[name]:
        close(op(name)(*args), ops.decompositions()[op(name)](*args))
    torch.library.opcheck(op(name), SAMPLES[name][0])
"""


def test_the_same_names_without_the_kernels() -> None:
    environment = {**os.environ, "DYNACONV_NATIVE": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_masks_of_other_types_and_layouts() -> None:
    x, mask, weight, *rest = masked_conv()
    want = mask * F.conv2d(x, weight, rest[0], 2, 1)
    for other in (mask.bool(), mask.double(), mask.contiguous(memory_format=torch.channels_last)):
        close(op("masked_conv2d")(x, other, weight, *rest), want)
    wide = drawn(2, 4, 9, 14)[..., ::2].copy_(x)
    close(op("masked_conv2d")(wide, mask, weight.contiguous(memory_format=torch.channels_last), *rest), want)


@needs_kernels
def test_a_packed_branch_is_told_from_other_tensors() -> None:
    x, mask, shortcut, *branch, break_even, _ = masked_branch()
    packed = torch.ops.dynaconv.pack_branch(*branch)
    close(
        op("masked_residual")(x, mask, shortcut, *branch, break_even, packed),
        op("masked_residual")(*masked_branch()),
    )
    run = torch.ops.dynaconv.run_branch
    assert run(x, mask, shortcut, packed, 0.0).numel() == 0
    for wrong in (
        packed[..., :-1].contiguous(),
        torch.zeros_like(packed),
        packed[..., :4].contiguous(),
        packed.double(),
    ):
        with pytest.raises(RuntimeError, match="not a packed branch"):
            run(x, mask, shortcut, wrong, 2.0)
    with pytest.raises(RuntimeError, match="does not hold these weights"):
        op("masked_residual")(x, mask, shortcut, *branch[:-1], 2, break_even, packed)


@needs_kernels
@pytest.mark.parametrize("threshold", [0.0, 0.7, float("nan")])
def test_masks_in_one_call_are_thresholded_logits(threshold: float) -> None:
    unit = MaskUnit(5, stride=2).eval()
    unit.threshold.fill_(threshold)
    x = drawn(2, 5, 9, 7)
    x[1, :, 0, 0] = float("nan")
    with torch.no_grad():
        at_once, logits = unit(x), unit.logits(x)
        assert unit._mask_at_once(x) is not None
        assert torch.equal(at_once, (logits >= unit.threshold).float())


def test_a_replaced_layer_is_noticed_in_evaluation() -> None:
    model = dc.create_model("dynconv_resnet8_cifar").eval()
    block, x = dc.masked_blocks(model)["layer1.0"], drawn(1, 16, 8, 8)
    with torch.no_grad(), force_masks(model, 0.5):
        before = block(x)
        block.block.conv2 = torch.nn.Conv2d(16, 16, 3, padding=1, bias=False)
        after = block(x)
        block.backend = "eager"
        close(after, block(x), 1e-4)
    assert not torch.equal(before, after)
