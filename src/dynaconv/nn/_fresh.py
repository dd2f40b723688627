"""Noticing that a module's parameters or buffers have changed since something was computed from them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Snapshot:
    """Remembers parts and tensors of some modules; `fresh()` is False once one was replaced, moved or written to."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        owners = [owner for module in modules for owner in module.modules()]
        self._parts = [(o._modules, name, part) for o in owners for name, part in o._modules.items()]
        self._tensors: list[tuple[dict, str, Tensor, int | None, int]] = []
        for owner in owners:
            for table in (owner._parameters, owner._buffers):
                for name, tensor in table.items():
                    # A counter of batches changes nothing that was computed, and only training counts.
                    if tensor is not None and name != "num_batches_tracked":
                        self._tensors.append((table, name, tensor, _version(tensor), tensor.data_ptr()))

    def fresh(self) -> bool:
        """Nothing has changed; one or two microseconds for a block."""
        for table, name, part in self._parts:
            if table.get(name) is not part:
                return False
        for table, name, tensor, version, address in self._tensors:
            if table.get(name) is not tensor or tensor.data_ptr() != address:
                return False
            if version is not None and tensor._version != version:
                return False
        return True


def _version(tensor: Tensor) -> int | None:
    """Writes so far; tensors made in inference mode do not count them."""
    return None if tensor.is_inference() else tensor._version
