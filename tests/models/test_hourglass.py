"""The stacked hourglass: the published sizes, any depth, masks where the publication has them."""

from __future__ import annotations

import pytest
import torch

import dynaconv as dc
from dynaconv.cost import count_dense
from dynaconv.models.hourglass import HourglassNet
from dynaconv.testing import force_masks


def test_published_sizes() -> None:
    """arXiv 1912.03203, pose: 57 mask units, 6.885 M parameters; MACs from the closed form in docs/keypoints.md."""
    model = dc.create_model("dynconv_hourglass4_mpii").eval()
    blocks = dc.masked_blocks(model)
    assert len(blocks) == 57 and {b.anatomy.kind for b in blocks.values()} == {"inverted_residual"}
    assert sum(p.numel() for p in model.parameters()) == 6_885_433
    with torch.no_grad():
        counts = count_dense(model, (3, 256, 256))
    conditional = sum(counts.convs[f"{n}.{path}"] for n, b in blocks.items() for path in b.conv_paths)
    positions = 4096 + 4 * (5440 + 2720 + 16 + 4096)
    assert positions == 53_184 and conditional == positions * 115_776 == 6_157_430_784
    assert counts.static - conditional == 742_260_736
    assert counts.gates == positions * 97 == 5_158_848


def test_skipping_equals_masking_and_compiling() -> None:
    torch.manual_seed(0)
    model = dc.create_model("dynconv_hourglass2_scenes", width=8, depth=2, image_size=32).eval()
    x = torch.randn(2, 3, 32, 32)
    fast = dc.compile(model, (x,), measure=False)
    with torch.no_grad(), force_masks(model, 0.3):
        outputs = []
        for backend in ("eager", "auto"):
            for block in dc.masked_blocks(model).values():
                block.backend, block.break_even = backend, 2.0
            outputs.append(model(x))
        assert outputs[0].shape == (2, 2, 5, 8, 8)
        for got in (outputs[1], fast(x)):
            assert float((got - outputs[0]).abs().max() / outputs[0].abs().max()) <= 1e-4


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match="multiple of 64 for depth 4, got 100"):
        HourglassNet(image_size=100)
    with pytest.raises(ValueError, match="width must be a multiple of 4"):
        HourglassNet(width=10)
    with pytest.raises(ValueError, match="depth must be a whole number"):
        HourglassNet(depth=0)
