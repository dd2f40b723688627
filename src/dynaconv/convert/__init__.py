"""Making static networks dynamic, in place and reversibly."""

from dynaconv.convert.configs import SpatialMasking, config_from_dict
from dynaconv.convert.dynamize import dynamize_, gates, masked_blocks, revert_
from dynaconv.convert.fuse import fuse_
from dynaconv.convert.gate_config import GateConfig
from dynaconv.convert.gate_configs import ChannelGate, LayerGate, Narrow, RandomMasking
from dynaconv.convert.halting import Halting, halting_stages
from dynaconv.convert.handlers import HANDLERS, Refusal, find_blocks, recognise
from dynaconv.convert.kernel_config import KernelConfig
from dynaconv.convert.kernel_configs import (
    CondConv,
    DCDConv,
    DYConv,
    DyNetConv,
    ODConv,
    WeightNetConv,
)
from dynaconv.convert.kernels import dynamic_layers
from dynaconv.convert.layer_sites import LayerSite, layer_sites
from dynaconv.convert.report import ConversionReport
from dynaconv.convert.scopes import paper_sites

__all__ = [
    "HANDLERS",
    "ChannelGate",
    "CondConv",
    "ConversionReport",
    "DCDConv",
    "DYConv",
    "DyNetConv",
    "GateConfig",
    "Halting",
    "KernelConfig",
    "LayerGate",
    "LayerSite",
    "Narrow",
    "ODConv",
    "RandomMasking",
    "Refusal",
    "SpatialMasking",
    "WeightNetConv",
    "config_from_dict",
    "dynamic_layers",
    "dynamize_",
    "find_blocks",
    "fuse_",
    "gates",
    "halting_stages",
    "layer_sites",
    "masked_blocks",
    "paper_sites",
    "recognise",
    "revert_",
]
