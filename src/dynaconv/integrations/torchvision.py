"""Import torchvision, also beside a torch build that its compiled operators do not fit.

A CPU-only torch next to the torchvision of the package index cannot load ``torchvision._C``, and the import
then fails because Python code registers itself on the operator ``nms`` that the library would have declared.
Declaring two schemas is enough for models, transforms and data sets; the operators themselves stay absent.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch

from dynaconv.integrations._optional import import_optional

_OPERATORS_ABSENT = "operator torchvision::nms does not exist"
_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def import_torchvision() -> ModuleType:
    """Import torchvision and return it; call this before anything else imports it.

    timm and Lightning import torchvision themselves: use :func:`~dynaconv.integrations.import_timm` and
    :func:`~dynaconv.integrations.import_lightning`, which come through here first.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: torchvision is broken in any other way than the one described above.

    Example:
        >>> torchvision = import_torchvision()
        >>> torchvision.models.resnet18(num_classes=10).fc.out_features
        10
    """
    try:
        return import_optional("torchvision", "train")
    except RuntimeError as error:
        if str(error) != _OPERATORS_ABSENT:
            raise
    _declare_operators()
    return import_optional("torchvision", "train")


@cache
def _declare_operators() -> torch.library.Library:
    """Declare the schemas once; the cache keeps the library, whose end would take them back."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in _SCHEMAS:
        library.define(schema)
    return library
