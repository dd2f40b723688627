"""What each ratio must not exceed: the promises that `--check` holds the engine to.

A masked network may take so many times its share of multiply-adds as here, times what is promised for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable

# (network, precision) -> ratio with everything computed, factor at density 0.5, factor at density 0.25.
MASKED = {
    ("timm:resnet50", "float32"): (1.00, 1.08, 1.12),
    ("timm:mobilenetv2_100", "float32"): (0.80, 1.15, 1.25),
    ("timm:resnet50", "bfloat16"): (1.03, 1.12, 1.20),
    ("timm:mobilenetv2_100", "bfloat16"): (1.03, 1.12, 1.20),
}
# network -> ratio to our own engine on the static network, by batch size.
KERNELS = {"dyconv4_resnet18": {1: 1.6, 8: 1.2}, "dcd_mobilenetv2_100": {1: 1.15, 8: 1.15}}
OTHERS = 1.15
# A promise is about these rivals: without all of them beside ours, a ratio neither keeps nor breaks it.
AGAINST = {"float32": {"onnxruntime", "openvino-f32"}, "bfloat16": {"openvino"}}


def limit(
    network: str, batch: int, precision: str, masks: str, macs_ratio: float, timed: Iterable[str]
) -> float | None:
    """The largest ratio allowed, None where nothing is promised, or not against the rivals that were `timed`.

    >>> both = ("onnxruntime", "openvino-f32")
    >>> round(limit("timm:resnet50", 1, "float32", "density 0.5", 0.6, both), 3)
    0.648
    >>> limit("timm:resnet18", 1, "float32", "density 1", 1.02, both)
    1.15
    >>> limit("timm:resnet18", 1, "float32", "density 0.5", 0.6, both) is None
    True
    """
    if masks == "dynamic kernels":
        return KERNELS.get(network, {}).get(batch) if precision == "float32" else None
    if not AGAINST[precision] <= set(timed):
        return None
    everything = masks in ("static", "density 1")
    if (network, precision) in MASKED:
        whole, half, quarter = MASKED[network, precision]
        factor = {"density 0.5": half, "density 0.25": quarter}.get(masks)
        # What is promised below full density is a share of the multiply-adds; bfloat16's is not scaled by its start.
        start = whole if precision == "float32" else 1.0
        return whole if everything else start * factor * macs_ratio if factor else None
    return OTHERS if everything and precision == "float32" and network not in KERNELS else None
