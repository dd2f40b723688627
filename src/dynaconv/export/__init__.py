"""Leaving Python with the speed-up: `torch.export` programs, and ONNX files that still skip in stock runtimes.

Needs the extra `export` for ONNX; `program` needs torch alone.
"""

from dynaconv.export.api import OnnxReport, onnx
from dynaconv.export.metadata import read_metadata
from dynaconv.export.program import program, save_program

__all__ = ["OnnxReport", "onnx", "program", "read_metadata", "save_program"]
