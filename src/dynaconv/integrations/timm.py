"""Import timm, which imports torchvision."""

from __future__ import annotations

from types import ModuleType

from dynaconv.integrations._optional import import_optional
from dynaconv.integrations.torchvision import import_torchvision


def import_timm() -> ModuleType:
    """Import timm and return it, with torchvision imported first (see :func:`import_torchvision`).

    It takes a second or two, so call it where a timm model is asked for and not at the top of a module.

    Raises:
        ImportError: timm or torchvision is not installed.

    Example:
        >>> timm = import_timm()
        >>> timm.create_model("resnet18", num_classes=10).num_classes
        10
    """
    import_torchvision()
    return import_optional("timm", "timm")
