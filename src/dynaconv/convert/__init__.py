"""Making static networks dynamic, in place and reversibly."""

from dynaconv.convert.configs import GateConfig, SpatialMasking, config_from_dict
from dynaconv.convert.dynamize import dynamize_, gates, masked_blocks, revert_
from dynaconv.convert.handlers import HANDLERS, recognise
from dynaconv.convert.report import ConversionReport

__all__ = [
    "HANDLERS",
    "ConversionReport",
    "GateConfig",
    "SpatialMasking",
    "config_from_dict",
    "dynamize_",
    "gates",
    "masked_blocks",
    "recognise",
    "revert_",
]
