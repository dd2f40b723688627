"""Drop-in modules: `import dynaconv.nn as dnn`."""

from dynaconv.nn.gate import Gate
from dynaconv.nn.mask_unit import MaskUnit
from dynaconv.nn.masked_block import Anatomy, MaskedBlock, Step
from dynaconv.nn.masked_conv import MaskedConv2d
from dynaconv.nn.spatial_mask import SpatialMask

__all__ = ["Anatomy", "Gate", "MaskUnit", "MaskedBlock", "MaskedConv2d", "SpatialMask", "Step"]
