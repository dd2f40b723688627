"""Building the published networks: a static base, initialised, then the paper's layers made dynamic."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from dynaconv import _checks
from dynaconv.convert.configs import config_from_dict
from dynaconv.convert.kernel_config import KernelConfig
from dynaconv.convert.kernels import apply_kernels, plan_kernels
from dynaconv.convert.layer_sites import layer_sites
from dynaconv.models.dynamic.bases import build_base
from dynaconv.models.dynamic.dymobile import DyMobile
from dynaconv.models.dynamic.dyresnet import DyResNet
from dynaconv.models.dynamic.dyshuffle import DyShuffleNetV2
from dynaconv.models.dynamic.names import NetworkName, listed_names, parse_name
from dynaconv.models.dynamic.weight_shuffle import WeightShuffleNetV2

_COUNT_OPTION = {"condconv": "num_experts", "dyconv": "num_kernels", "odconv": "num_kernels"}


def create_dynamic(
    name: str,
    *,
    num_classes: int | None = None,
    in_chans: int | None = None,
    kernels: KernelConfig | dict[str, Any] | None = None,
    **options,
) -> nn.Module:
    """A published network with dynamic kernels, freshly initialised.

    The static network is initialised first and converted after, so that its own initialisation never touches experts,
    routers or layers that start at zero.

    The network says what it is: `arch` (name and options for `create_model`) and `input_size` (C, H, W).

    Args:
        name: see `parse_name`.
        num_classes, in_chans: None keeps the base's own.
        kernels: another config than the published one (or its `to_dict`), such as
            `dc.CondConv(num_experts=8, init="fresh", first_block=6, head=True)`; its scope decides about the layers.
        options: for the static base, such as dropout.
    Raises:
        ValueError: an unknown name, or a config of another method than the name's.
    """
    parsed = parse_name(name)
    if parsed is None:
        raise _checks.unknown("network with dynamic kernels", name, listed_names())
    config = config_from_dict(kernels) if isinstance(kernels, dict) else kernels
    if config is not None and config.kind != parsed.method:
        raise ValueError(f"{name} needs kernels of the method {parsed.method}, got {config.kind}")
    model = _static(parsed, num_classes, in_chans, options)
    classes = model.get_submodule(layer_sites(model)[-1].name).out_features
    channels = next(model.parameters()).shape[1]
    model.arch = {"name": name, "num_classes": classes, "in_chans": channels, **options}
    if config is not None:
        model.arch["kernels"] = config.to_dict()
    if not hasattr(model, "input_size"):
        model.input_size = (channels, 224, 224)
    config = config or published_config(parsed)
    if config is not None:
        # What `dynamize_` does, without its report, whose multiply-adds take two forward passes.
        apply_kernels(model, plan_kernels(model, {"": config}))
    return model


def published_config(name: NetworkName) -> KernelConfig | None:
    """The config that makes the published network of its static base; None for a static network.

    DCD runs factored, as it was trained and counted. It divides its predictor's width by 16, and by 8 in MobileNetV2
    narrower than 0.75 (the released code's default).
    """
    if name.method is None:
        return None
    options: dict[str, Any] = {"kind": name.method, "scope": "paper", "init": "fresh"}
    if name.method == "dcd":
        options["form"] = "factored"
    if name.count is not None:
        options[_COUNT_OPTION[name.method]] = name.count
    width = re.fullmatch(r"mobilenetv2_(\d{3})", name.base)
    if name.method == "dcd" and width and int(width[1]) < 75:
        options["fc_squeeze"] = 8
    return config_from_dict(options)


def _static(name: NetworkName, num_classes: int | None, in_chans: int | None, options: dict) -> nn.Module:
    given = {"num_classes": num_classes, "in_chans": in_chans}
    given = {key: value for key, value in given.items() if value is not None}
    family, _, rest = name.base.partition("_")
    if family in ("dymobile", "fixmobile"):
        return DyMobile(**given, width=int(rest) / 100, **options)
    if name.method == "weightnet" and family == "shufflenetv2":
        return WeightShuffleNetV2(**given, width=int(rest) / 100, **options)
    if family == "dyshufflenetv2":
        return DyShuffleNetV2(**given, width=int(rest) / 100, **options)
    if family.startswith("dyresnet"):
        return DyResNet(int(family.removeprefix("dyresnet")), **given, **options)
    base = name.base.removeprefix("dy") if family == "dymobilenetv3" else name.base
    if name.method == "condconv" and family == "efficientnet":
        options = {"dropout": 0.25, "stochastic_depth_prob": 0.2, **options}
    return build_base(base, **given, **options)
