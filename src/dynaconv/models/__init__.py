"""Networks by name, and saving them."""

from dynaconv.models.checkpoint import load, read_config, save
from dynaconv.models.cifar_resnet import BasicBlock, CifarResNet
from dynaconv.models.registry import create_model, list_models, register_model

__all__ = [
    "BasicBlock",
    "CifarResNet",
    "create_model",
    "list_models",
    "load",
    "read_config",
    "register_model",
    "save",
]
