"""Names of networks with dynamic kernels: METHOD[COUNT]_BASE, and DyNet's own networks."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dynaconv.models.dynamic.bases import is_base

# Whether a method's name carries how many experts or kernels there are.
COUNTED = {"condconv": True, "dyconv": True, "odconv": True, "dynet": False, "dcd": False, "weightnet": False}
_OWN = (
    r"dymobile_\d{3}",
    r"fixmobile_\d{3}",
    r"dyresnet(18|34|50|101|152)",
    r"dyshufflenetv2_\d{3}",
    r"dymobilenetv3_(small|large)(_\d{3})?",
)


@dataclass(frozen=True)
class NetworkName:
    """A name taken apart: method (None: a static network), count of experts or kernels, and the static base."""

    method: str | None
    count: int | None
    base: str


def parse_name(name: str) -> NetworkName | None:
    """The parts of a network's name, or None where no network is called that.

    >>> parse_name("odconv2_resnet101")
    NetworkName(method='odconv', count=2, base='resnet101')
    >>> parse_name("dyresnet18")
    NetworkName(method='dynet', count=None, base='dyresnet18')
    """
    if any(re.fullmatch(pattern, name) for pattern in _OWN):
        return NetworkName(None if name.startswith("fix") else "dynet", None, name)
    match = re.fullmatch(r"([a-z]+)([1-9]\d*)?_(.+)", name)
    if (
        match is None
        or match[1] not in COUNTED
        or COUNTED[match[1]] != bool(match[2])
        or not is_base(match[3])
    ):
        return None
    return NetworkName(match[1], int(match[2]) if match[2] else None, match[3])


def listed_names() -> list[str]:
    """The names that `list_models` shows; `parse_name` takes any other width, depth, base and count too."""
    resnets = [f"resnet{d}" for d in (18, 34, 50, 101)]
    mobiles = [f"mobilenetv2_{w}" for w in ("100", "075", "050", "035")]
    later = ["mobilenetv3_small", "mobilenetv3_large", "efficientnet_b0"]
    small = [f"resnet{d}_cifar" for d in (8, 14, 20)]
    methods = ("condconv8", "dyconv4", "dcd", "odconv1", "odconv4")
    names = [f"{m}_{base}" for base in (*resnets, *mobiles, *later) for m in methods]
    names += [f"{m}_{base}" for base in small for m in ("condconv8", "dyconv4", "dynet", "dcd", "odconv1")]
    names += ["condconv4_efficientnet_b0", "condconv8_efficientnet_b0_depth110", "odconv2_resnet101"]
    names += ["dymobile_100", "dymobile_075", "dymobile_050", "fixmobile_100", "dynet_mobilenetv2_100"]
    names += ["dyresnet18", "dyresnet34", "dyresnet50", "dyresnet101", "dynet_efficientnet_b0"]
    names += ["dymobilenetv3_small", "dymobilenetv3_large"]
    names += [
        f"{m}_{w}" for m in ("dyshufflenetv2", "weightnet_shufflenetv2") for w in ("050", "100", "150", "200")
    ]
    return sorted(names)
