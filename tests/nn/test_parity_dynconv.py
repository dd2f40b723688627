"""Numbers of the published implementation (tests/fixtures/README.md)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dynaconv.budget import bounds, budget_loss
from dynaconv.cost import block_cost
from dynaconv.models import BasicBlock
from dynaconv.nn import Anatomy, MaskedBlock, MaskUnit, SpatialMask, Step
from dynaconv.ops import gumbel_mask

FIXTURES = Path(__file__).parent.parent / "fixtures"
OUTPUTS, GRADIENTS = 1e-5, 5e-5


def read(name: str) -> tuple[dict[str, Tensor], dict]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        return tensors, json.loads(file.metadata()["cases"])


def close(got: Tensor, want: Tensor, tolerance: float) -> None:
    assert got.shape == want.shape
    error = (got - want).abs().max() / want.abs().max()
    assert error <= tolerance, f"relative deviation {error:.2e} > {tolerance:.0e}"


def load_gate(gate: MaskUnit, tensors: dict[str, Tensor]) -> None:
    prefix = "param.mask."
    named = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
    missing = gate.load_state_dict(named, strict=False)
    assert not missing.unexpected_keys
    assert {"temperature", "noise", "threshold", "budget_table"} == set(missing.missing_keys)


UNIT, UNIT_CASES = read("dynconv_mask_unit_s1")


@pytest.mark.parametrize("case", UNIT_CASES)
def test_mask_unit(case: str) -> None:
    facts = UNIT_CASES[case]
    unit = MaskUnit(6, kind="squeeze", temperature=facts.get("tau", 1.0))
    load_gate(unit, UNIT)
    unit.train(facts["mode"] == "train")
    x = UNIT[f"{case}.x"].clone().requires_grad_(True)
    z = unit.logits(x)
    close(z, UNIT[f"{case}.z"], OUTPUTS)
    noise = UNIT[f"{case}.L"] if facts.get("noise") else torch.zeros_like(z)
    mask = unit.decide(z, noise=noise)
    assert torch.equal(mask, UNIT[f"{case}.M"])
    if facts["mode"] == "eval":
        dilated = SpatialMask(mask).dilate(tuple(x.shape[2:]))
        assert torch.equal(dilated.as_subclass(Tensor), UNIT[f"{case}.D"])
        return
    z.retain_grad()
    (UNIT[f"{case}.v"] * mask).sum().backward()
    close(x.grad, UNIT[f"{case}.grad.x"], GRADIENTS)
    close(z.grad, UNIT[f"{case}.grad.z"], GRADIENTS)
    for name, parameter in unit.named_parameters():
        close(parameter.grad, UNIT[f"{case}.grad.mask.{name}"], GRADIENTS)


def test_noise_of_the_fixture_is_the_difference_of_two_gumbels() -> None:
    eps = 1e-8
    u1, u2 = UNIT["even_train_noise_tau1.U1"], UNIT["even_train_noise_tau1.U2"]
    gumbel = [-torch.log(-torch.log(u + eps) + eps) for u in (u1, u2)]
    close(gumbel[0] - gumbel[1], UNIT["even_train_noise_tau1.L"], OUTPUTS)


BLOCK, BLOCK_CASES = read("dynconv_basic_block_s1")


def masked_basic_block() -> MaskedBlock:
    block = BasicBlock(8, 8)
    names = ("conv1.", "bn1.", "conv2.", "bn2.")
    own = {k[6:]: v for k, v in BLOCK.items() if k.startswith("param.") and k[6:].startswith(names)}
    own |= {f"{bn}.num_batches_tracked": torch.tensor(0) for bn in ("bn1", "bn2")}
    block.load_state_dict(own)
    block.relu = nn.ReLU()
    gate = MaskUnit(8, kind="squeeze")
    load_gate(gate, BLOCK)
    gate.noise.zero_()
    steps = (Step("conv1", "bn1", "relu"), Step("conv2", "bn2"))
    return MaskedBlock(block, Anatomy("basic", steps, act="relu"), gate)


@pytest.mark.parametrize("case", BLOCK_CASES)
@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_basic_block(case: str, backend: str) -> None:
    masked = masked_basic_block().train(BLOCK_CASES[case]["mode"] == "train")
    masked.backend, masked.break_even = backend, 2.0
    x = BLOCK[f"{case}.x"].clone().requires_grad_(True)
    masks: list[Tensor] = []
    masked.gate.register_forward_hook(lambda _m, _a, mask: masks.append(mask))
    y = masked(x)
    close(y, BLOCK[f"{case}.y"], OUTPUTS)
    assert torch.equal(masks[0], BLOCK[f"{case}.M"])
    cost = block_cost(masked, masks[0], tuple(x.shape[2:]))
    for conv, letter in zip(cost.convs, ("D", "M"), strict=True):
        assert torch.equal(conv.mask, BLOCK[f"{case}.{letter}"])
        assert conv.mask.sum() == BLOCK[f"{case}.a_{letter}"]
        assert conv.mask.numel() == BLOCK[f"{case}.t_{letter}"]
        assert conv.macs_per_position == BLOCK[f"{case}.f_{letter}"]
    if BLOCK_CASES[case]["mode"] == "eval":
        return
    (BLOCK[f"{case}.v"] * y).sum().backward()
    close(x.grad, BLOCK[f"{case}.grad.x"], GRADIENTS)
    for term, parameter in masked.block.named_parameters():
        close(parameter.grad, BLOCK[f"{case}.grad.{term}"], GRADIENTS)
    for term, parameter in masked.gate.named_parameters():
        close(parameter.grad, BLOCK[f"{case}.grad.mask.{term}"], GRADIENTS)
    for term, buffer in masked.block.named_buffers():
        if not term.endswith("num_batches_tracked"):
            close(buffer, BLOCK[f"{case}.after.{term}"], OUTPUTS)


LOSS, LOSS_CASES = read("dynconv_budget_loss_theta05")


@pytest.mark.parametrize("case", LOSS_CASES)
def test_budget_loss(case: str) -> None:
    facts = LOSS_CASES[case]
    p = {k[6:]: v.double() for k, v in LOSS.items() if k.startswith("param.")}
    active = p["a_M"].clone().requires_grad_(True)
    executed = p["a_D"] * p["f_D"] + active * p["f_M"]
    dense = p["t_D"] * p["f_D"] + p["t_M"] * p["f_M"]
    loss = budget_loss(executed, dense, facts["theta"], facts["epoch"] / (0.33 * facts["epochs"]))
    for name, got in (
        ("L_net", loss.network),
        ("L_block", loss.blocks),
        ("loss", loss.total),
        ("r", loss.ratio),
    ):
        close(got.float().reshape(1), LOSS[f"{case}.{name}"], OUTPUTS)
    close(loss.block_ratios.float(), LOSS[f"{case}.r_i"], OUTPUTS)
    for name, got in (("upper", loss.upper), ("lower", loss.lower)):
        assert got == pytest.approx(float(LOSS[f"{case}.{name}"]), rel=1e-5, abs=1e-7)
    loss.total.backward()
    close(active.grad.float(), LOSS[f"{case}.grad.a_M"], GRADIENTS)


@pytest.mark.parametrize(
    ("target", "rows"),
    [
        (0.3, [(0.3, 0.3), (0.4025, 0.2561), (0.65, 0.15), (0.8975, 0.0439), (1.0, 0.0)]),
        (0.7, [(0.7, 0.7), (0.7439, 0.5975), (0.85, 0.35), (0.9561, 0.1025), (1.0, 0.0)]),
    ],
)
def test_bounds_over_the_schedule(target: float, rows: list[tuple[float, float]]) -> None:
    for i, row in enumerate(rows):
        assert [round(v, 4) for v in bounds(target, i / 4)] == list(row)


def test_gradient_keeps_its_shape_over_temperatures() -> None:
    z = torch.linspace(-3, 3, 7).view(1, 1, 1, 7)
    for tau in (0.5, 1.0, 2.5):
        leaf = z.clone().requires_grad_(True)
        gumbel_mask(leaf, temperature=tau, noise=0).sum().backward()
        p = torch.sigmoid(z / tau)
        close(leaf.grad, p * (1 - p) / tau, GRADIENTS)
