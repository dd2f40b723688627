"""Noticing that a module's parameters or buffers have changed since something was computed from them."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

_Entry = tuple[dict, str, Tensor, int, int]


class Snapshot:
    """Remembers the tensors of some modules; `fresh()` is False once one was replaced, moved or written to."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._entries: list[_Entry] = []
        for module in modules:
            for owner in module.modules():
                for table in (owner._parameters, owner._buffers):
                    for name, tensor in table.items():
                        if tensor is not None:
                            self._entries.append((table, name, tensor, _version(tensor), tensor.data_ptr()))

    def fresh(self) -> bool:
        """Nothing has changed; some microseconds for a block."""
        for table, name, tensor, version, address in self._entries:
            if table.get(name) is not tensor or _version(tensor) != version or tensor.data_ptr() != address:
                return False
        return True


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
