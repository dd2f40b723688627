"""Drop-in modules: `import dynaconv.nn as dnn`."""

from dynaconv.nn.channel_block import ChannelBlock
from dynaconv.nn.channel_unit import ChannelUnit, WidthUnit
from dynaconv.nn.condconv import CondConv1d, CondConv2d, CondConv3d, CondLinear
from dynaconv.nn.dcd import DCDConv1d, DCDConv2d, DCDConv3d, DCDLinear
from dynaconv.nn.dyconv import DYConv1d, DYConv2d, DYConv3d
from dynaconv.nn.dynamic_conv import DynamicConv, KernelMacs
from dynaconv.nn.dynet import DyNetConv1d, DyNetConv2d, DyNetConv3d
from dynaconv.nn.gate import Gate
from dynaconv.nn.halting import HaltingSequential, HaltingUnit
from dynaconv.nn.layer_unit import LayerUnit
from dynaconv.nn.mask_unit import MaskUnit
from dynaconv.nn.masked_block import Anatomy, MaskedBlock, Step
from dynaconv.nn.masked_conv import MaskedConv2d
from dynaconv.nn.odconv import ODConv1d, ODConv2d, ODConv3d
from dynaconv.nn.random_unit import RandomUnit
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.nn.spatial_mask import SpatialMask
from dynaconv.nn.temperature import TemperatureSchedule, set_temperature
from dynaconv.nn.weightnet import WeightNetConv1d, WeightNetConv2d, WeightNetConv3d

__all__ = [
    "Anatomy",
    "ChannelBlock",
    "ChannelUnit",
    "CondConv1d",
    "CondConv2d",
    "CondConv3d",
    "CondLinear",
    "DCDConv1d",
    "DCDConv2d",
    "DCDConv3d",
    "DCDLinear",
    "DYConv1d",
    "DYConv2d",
    "DYConv3d",
    "DyNetConv1d",
    "DyNetConv2d",
    "DyNetConv3d",
    "DynamicConv",
    "Gate",
    "HaltingSequential",
    "HaltingUnit",
    "KernelMacs",
    "LayerUnit",
    "MaskUnit",
    "MaskedBlock",
    "MaskedConv2d",
    "ODConv1d",
    "ODConv2d",
    "ODConv3d",
    "RandomUnit",
    "RoutedBlock",
    "SpatialMask",
    "Step",
    "TemperatureSchedule",
    "WeightNetConv1d",
    "WeightNetConv2d",
    "WeightNetConv3d",
    "WidthUnit",
    "set_temperature",
]
