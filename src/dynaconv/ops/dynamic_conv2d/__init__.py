"""Convolution with one kernel per sample, mixed from experts (1-D, 2-D and 3-D)."""

from dynaconv.ops.dynamic_conv2d.api import dynamic_conv2d, per_sample_conv
from dynaconv.ops.dynamic_conv2d.choice import EXECUTIONS, choose_execution
from dynaconv.ops.dynamic_conv2d.reference import mix_kernels

__all__ = ["EXECUTIONS", "choose_execution", "dynamic_conv2d", "mix_kernels", "per_sample_conv"]
