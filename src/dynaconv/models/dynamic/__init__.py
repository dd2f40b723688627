"""The published networks with dynamic kernels, by name."""

from dynaconv.models.dynamic.bases import build_base
from dynaconv.models.dynamic.dymobile import DyMobile, DyMobileBlock
from dynaconv.models.dynamic.dyresnet import DyResNet
from dynaconv.models.dynamic.dyshuffle import DyShuffleNetV2, DyShuffleUnit
from dynaconv.models.dynamic.names import NetworkName, listed_names, parse_name
from dynaconv.models.dynamic.published import create_dynamic, published_config
from dynaconv.models.dynamic.weight_shuffle import WeightShuffleNetV2, WeightShuffleUnit

__all__ = [
    "DyMobile",
    "DyMobileBlock",
    "DyResNet",
    "DyShuffleNetV2",
    "DyShuffleUnit",
    "NetworkName",
    "WeightShuffleNetV2",
    "WeightShuffleUnit",
    "build_base",
    "create_dynamic",
    "listed_names",
    "parse_name",
    "published_config",
]
