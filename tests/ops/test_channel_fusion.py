"""Dynamic channel fusion: both forms equal the formula, values and gradients, for every geometry."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dynaconv.ops.channel_fusion import (
    Affine,
    channel_fusion,
    cheaper_form,
    factored_macs,
    folded_macs,
    fused_kernels,
)

SIZES = {1: (11,), 2: (9, 12), 3: (7, 6, 5)}
CASES = list(itertools.product((1, 2, 3, 5), (0, 1, 3), (1, 2), (1, 2, 3)))


def parts(dims: int, kernel: int, groups: int = 1, bias: bool = True, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(kernel + 10 * dims)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "x": draw(batch, 4, *SIZES[dims]),
        "weight": draw(6, 4 // groups, *(kernel,) * dims),
        "bias": draw(6) if bias else None,
        "q": draw(3, 4),
        "p": draw(6, 3),
        "scale": draw(batch, 6),
        "fusion": draw(batch, 3, 3),
    }


def affine(seed: int) -> Affine:
    generator = torch.Generator().manual_seed(seed)
    return Affine(*torch.randn(2, 3, generator=generator, dtype=torch.float64))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> None:
    assert got.shape == want.shape
    assert float((got - want).detach().abs().max()) <= tolerance * float(want.detach().abs().max())


def by_hand(part: dict, geometry: tuple, norms: tuple[Affine, Affine]) -> Tensor:
    """W(x) = Lambda W0 + (P (diag(a2) Phi + I) diag(a1) Q at the centre tap), image by image."""
    kernel = part["weight"].shape[2:]
    conv = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    (a1, c1), (a2, c2) = norms
    outputs = []
    for x, scale, fusion in zip(part["x"], part["scale"], part["fusion"], strict=True):
        mixed = torch.diag(a2) @ fusion + torch.eye(3, dtype=x.dtype)
        w = torch.diag(scale) @ part["weight"].flatten(1)
        w = w.reshape(part["weight"].shape).clone()
        w[(slice(None), slice(None), *(k // 2 for k in kernel))] += (
            part["p"] @ mixed @ torch.diag(a1) @ part["q"]
        )
        b = part["p"] @ (mixed @ c1 + c2) + (0 if part["bias"] is None else scale * part["bias"])
        outputs.append(conv(x[None], w, b, *geometry))
    return torch.cat(outputs)


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("form", ["factored", "folded", "auto"])
def test_forms_equal_the_formula(dims: int, form: str) -> None:
    norms = (affine(1), affine(2))
    for kernel, padding, dilation, stride in CASES:
        if dims == 3 and (kernel == 5 or dilation == 2):
            continue
        part = parts(dims, kernel, bias=kernel != 2)
        want = by_hand(part, (stride, padding, dilation), norms)
        got = channel_fusion(
            **part, stride=stride, padding=padding, dilation=dilation, norms=norms, form=form
        )
        close(got, want)


@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_main_path_is_factored(groups: int) -> None:
    part = parts(2, 3, bias=False)
    part["weight"] = part["weight"][:4, : 4 // groups]
    part["p"], part["scale"] = part["p"][:4], part["scale"][:, :4]
    want = F.conv2d(part["x"], part["weight"], None, 1, 1, 1, groups) * part["scale"][..., None, None]
    u = torch.einsum("li,bihw->blhw", part["q"], part["x"])
    fused = torch.einsum("blm,bmhw->blhw", part["fusion"], u) + u
    want = want + torch.einsum("ol,blhw->bohw", part["p"], fused)
    close(channel_fusion(**part, padding=1, groups=groups), want)
    with pytest.raises(ValueError, match="form 'folded' cannot run with groups=.*use form='factored'"):
        channel_fusion(**part, padding=1, groups=groups, form="folded")
    with pytest.raises(ValueError, match=f"groups={groups}"):
        fused_kernels(*(part[k] for k in ("weight", "bias", "q", "p", "scale", "fusion")))


@pytest.mark.parametrize("form", ["factored", "folded"])
def test_gradcheck(form: str) -> None:
    part = {k: v[..., :5, :4] if k == "x" else v for k, v in parts(2, 3).items()}
    leaves = [v.clone().requires_grad_(True) for v in part.values()]
    norms = [affine(1), affine(2)]

    def run(*tensors: Tensor) -> Tensor:
        return channel_fusion(*tensors, stride=2, padding=1, norms=(norms[0], norms[1]), form=form)

    assert torch.autograd.gradcheck(run, tuple(leaves))


def test_training_norms_take_statistics_of_the_batch() -> None:
    part = {k: v.float() for k, v in parts(2, 3).items()}
    norms = (nn.BatchNorm2d(3), nn.BatchNorm2d(3))
    got = channel_fusion(**part, padding=1, norms=norms)
    u = F.batch_norm(F.conv2d(part["x"], part["q"][..., None, None]), None, None, training=True)
    fused = torch.einsum("blm,bmhw->blhw", part["fusion"], u)
    fused = F.batch_norm(fused, None, None, training=True) + u
    want = F.conv2d(part["x"], part["weight"], part["bias"], padding=1) * part["scale"][..., None, None]
    close(got, want + F.conv2d(fused, part["p"][..., None, None]), 1e-5)
    assert all(bool((norm.running_mean != 0).all()) for norm in norms)
    with pytest.raises(ValueError, match="batch statistics cannot be folded"):
        channel_fusion(**part, padding=1, norms=norms, form="folded")


def test_costs_and_the_choice_between_forms() -> None:
    assert factored_macs(3, 5, 2, 7) == 7 * (3 * 2 + 2 * 2 + 2 * 5)
    assert folded_macs(3, 5, 2, 9) == 5 * 2 * 2 + 5 * 2 * 3 + 5 * 3 * 9
    assert cheaper_form(16, 96, 8, 1, 112 * 112) == "folded"
    assert cheaper_form(16, 96, 8, 1, 112 * 112, groups=2) == "factored"
    assert cheaper_form(960, 160, 40, 1, 49) == "factored"


def test_channels_last_stays() -> None:
    part = {k: v.float() for k, v in parts(2, 3).items()}
    want = channel_fusion(**part, padding=1)
    part["x"] = part["x"].contiguous(memory_format=torch.channels_last)
    for form in ("factored", "folded"):
        got = channel_fusion(**part, padding=1, form=form)
        assert got.is_contiguous(memory_format=torch.channels_last)
        close(got, want, 1e-5)


def test_bad_input() -> None:
    part = parts(2, 3)
    with pytest.raises(ValueError, match=r"scale \(\[B, O\]\) must end in \[6\], got \[5\]"):
        channel_fusion(**{**part, "scale": part["scale"][:, :5]})
    with pytest.raises(ValueError, match=r"fusion \(\[B, L, L\]\) must end in \[3, 3\]"):
        channel_fusion(**{**part, "fusion": part["fusion"][:, :2]})
    with pytest.raises(ValueError, match=r"p must end in \[6, 3\], got \[6, 2\]"):
        channel_fusion(**{**part, "p": part["p"][:, :2]})
    with pytest.raises(ValueError, match="unknown form 'fold'; did you mean 'folded'"):
        channel_fusion(**part, form="fold")
