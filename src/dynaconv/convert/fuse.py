"""Folding batch norm into the convolution before it, static or dynamic, for deployment."""

from __future__ import annotations

from collections import Counter

from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from dynaconv import _checks
from dynaconv.convert.kernels import replace_module
from dynaconv.nn._fold import norm_activation
from dynaconv.nn.dynamic_conv import DynamicConv, DynamicLayer
from dynaconv.nn.masked_block import MaskedBlock

_STATIC = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fuse_(model: nn.Module) -> list[str]:
    """Fold every batch norm that follows a convolution into it, in place; the network computes the same.

    A static convolution takes it into weight and bias, a dynamic one into its experts and a bias outside the mixture.
    The batch norm becomes an identity (or its own activation). Masked blocks fold by themselves and are left alone.

    Args:
        model: in evaluation mode. It can no longer be trained, or saved with `save`, as it was: fuse a copy.
    Returns:
        Names of the convolutions that absorbed a batch norm.
    Raises:
        ValueError: a model in training mode, or one whose forward cannot be traced by torch.fx.
    Source: docs/kernels.md, the folding table.

    >>> import dynaconv as dc
    >>> model = dc.create_model("resnet8_cifar").eval()
    >>> report = dc.dynamize_(model, {"layer3": dc.DYConv()})
    >>> fuse_(model)[:2]
    ['conv1', 'layer1.0.conv1']
    """
    if any(isinstance(m, _BatchNorm) and m.training for m in model.modules()):
        raise _checks.fuse_in_training()
    try:
        graph = _Tracer().trace(model)
    except (fx.proxy.TraceError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise _checks.cannot_fuse(type(model).__name__, error) from error
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    done = []
    for node in graph.nodes:
        source = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(source, fx.Node) or source.op != "call_module" or len(source.users) != 1:
            continue
        if calls[node.target] == 1 and calls[source.target] == 1 and _fold(model, source.target, node.target):
            done.append(source.target)
    return done


class _Tracer(fx.Tracer):
    """Looks into everything that has convolutions or batch norms inside, and into nothing else."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, MaskedBlock | DynamicLayer):
            return True
        parts = (type(part) in _STATIC or isinstance(part, (DynamicConv, _BatchNorm)) for part in m.modules())
        return next(m.children(), None) is None or isinstance(m, _BatchNorm) or not any(parts)


def _fold(model: nn.Module, conv_name: str, norm_name: str) -> bool:
    conv, norm = model.get_submodule(conv_name), model.get_submodule(norm_name)
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return False
    if isinstance(conv, DynamicConv):
        conv.fold_norm_(norm)
    elif type(conv) in _STATIC:
        replace_module(model, conv_name, fuse_conv_bn_eval(conv, norm))
    else:
        return False
    left = norm_activation(norm) or nn.Identity()
    # Whoever asks whether the network is in evaluation mode asks every part of it.
    replace_module(model, norm_name, left.train(norm.training))
    return True
