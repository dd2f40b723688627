"""The network that all engines run: prepared once for eager PyTorch, exported once to ONNX."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from dynaconv.cost import prepare_for_timing

BATCH = "batch"


class Subject:
    """A copy in evaluation mode, channels-last, batch norm folded; its ONNX file lives until `close`."""

    def __init__(self, model: nn.Module) -> None:
        self.model = prepare_for_timing(model)
        self._folder: tempfile.TemporaryDirectory | None = None
        self._file: Path | None = None

    def onnx_file(self, x: Tensor) -> Path:
        """The network as an ONNX file whose batch is free, in a temporary folder; written on the first call.

        Args:
            x: [N, C, H, W], an example; C, H and W are fixed in the file.
        Raises:
            RuntimeError: what torch.onnx says where it cannot export the network.
        """
        if self._file is None:
            self._folder = tempfile.TemporaryDirectory(prefix="dynaconv-")
            file = Path(self._folder.name) / "network.onnx"
            # torch.export takes an axis of length 1 for a constant, so the example has two images.
            example = x[:1].expand(2, *x.shape[1:]).contiguous()
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter("ignore")
                torch.onnx.export(
                    self.model,
                    (example,),
                    file,
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim(BATCH)},),
                    external_data=False,
                    verbose=False,
                )
            self._file = file
        return self._file

    def close(self) -> None:
        """Remove the ONNX file; engines that have read it go on working."""
        if self._folder is not None:
            self._folder.cleanup()
        self._folder = self._file = None
