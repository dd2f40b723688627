"""Weights of the published implementations: their names and shapes, translated layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from dynaconv import _checks
from dynaconv.nn.channel_fusion import ChannelFusion
from dynaconv.nn.condconv import CondConv1d, CondConv2d, CondConv3d
from dynaconv.nn.dyconv import DYConv1d, DYConv2d, DYConv3d
from dynaconv.nn.odconv import ODConv1d, ODConv2d, ODConv3d
from dynaconv.nn.routed_block import RoutedBlock


@dataclass(frozen=True)
class _Dialect:
    """How an original names the tensors of a layer.

    names: what a name starts with there, and here. free: linear layers of ours whose width may differ there, and whose
    bias may be missing there, which is a bias of zero.
    """

    kinds: tuple[type[nn.Module], ...]
    names: dict[str, str]
    free: tuple[str, ...] = ()

    def translate(self, name: str) -> str | None:
        """Our name for a name of the original's, None for one that it cannot have."""
        starts = (s for s in self.names if name == s or (s.endswith(".") and name.startswith(s)))
        start = next(starts, None)
        return None if start is None else self.names[start] + name[len(start) :]


_DCD = {
    **dict.fromkeys(("conv.", "cls."), ""),
    **dict.fromkeys(("q.weight", "conv_q.weight", "cls_q.weight"), "q"),
    **dict.fromkeys(("p.weight", "conv_p.weight", "cls_p.weight"), "p"),
    "fc.0.": "router.squeeze.",
    "fc.1.fc.0.": "router.gate.",
    "fc_phi.": "router.fusion.",
    "fc_scale.": "router.scale.",
    "bn1.": "norm1.",
    "bn2.": "norm2.",
}
_ODCONV = {
    "weight": "weight",
    "attention.fc.": "router.trunk.",
    "attention.bn.": "router.norm.",
    **{f"attention.{head}_fc.": f"router.{head}." for head in ("channel", "filter", "spatial", "kernel")},
}
_CONDCONV = {"weight": "weight", "bias": "bias"}
_DYCONV = {**_CONDCONV, "attention.fc1.": "router.fc1.", "attention.fc2.": "router.fc2."}

_DIALECTS = (
    _Dialect((ChannelFusion,), _DCD),
    _Dialect((ODConv1d, ODConv2d, ODConv3d), _ODCONV),
    _Dialect((CondConv1d, CondConv2d, CondConv3d), _CONDCONV),
    _Dialect((DYConv1d, DYConv2d, DYConv3d), _DYCONV, free=("router.fc1", "router.fc2")),
)
# A name that ends like this belongs to a dynamic layer of the original, whose path comes before it.
_MARKS = ("fc_phi.weight", "attention.fc.weight", "attention.fc1.weight")
# What an original need not save: a Python number there, or a count of batches.
_NOT_SAVED = ("temperature", "num_batches_tracked")


def load_original_(model: nn.Module, state_dict: Mapping[str, Tensor], *, match: str = "name") -> list[str]:
    """Load weights that a published implementation saved into the same network built here, in place.

    Understands DCD (github.com/liyunsheng13/dcd), ODConv (OSVAI/ODConv), CondConv (timm: flat experts, and
    `routing_fn` for a block) and DY-Conv (kaijieshi7/Dynamic-convolution-Pytorch, whose attention has another hidden
    width and lacks biases: the layer's attention gets that width, and biases of zero). All other layers are copied.

    Args:
        model: a dynamic layer, or a network with dynamic layers at any depth.
        state_dict: from the original, perhaps of `nn.DataParallel` ("module." before every name).
        match: "name" where both networks call their layers alike (as ODConv's and torchvision's ResNets do), "order"
            to pair the layers in the order in which they appear.
    Returns:
        Entries of the model that the original does not save and that keep their value, such as temperatures; set those
        with `dynaconv.nn.set_temperature` (1 after a completed training).
    Raises:
        ValueError: layers or shapes that do not fit, naming the first one.

    >>> import torch
    >>> from dynaconv.nn.condconv import CondConv2d
    >>> layer = CondConv2d(8, 4, 3, num_experts=2, bias=False, router=False)
    >>> load_original_(layer, {"weight": torch.randn(2, 4 * 8 * 3 * 3)})
    []
    """
    translated = remap_original(state_dict, model, match=match)
    for path, layer in _our_layers(model):
        _widen_(layer, path, translated)
    missing = model.load_state_dict(translated, strict=False).missing_keys
    absent = [key for key in missing if not key.endswith(_NOT_SAVED)]
    if absent:
        raise _checks.original_lacks(absent)
    return missing


def remap_original(
    state_dict: Mapping[str, Tensor], model: nn.Module, *, match: str = "name"
) -> dict[str, Tensor]:
    """The tensors of `load_original_` under the names and with the shapes that `model` has; nothing is changed.

    Raises:
        ValueError: layers or shapes that do not fit, naming the first one.
    """
    _checks.one_of("match", match, ("name", "order"))
    theirs, ours = _their_layers(_unwrapped(state_dict)), dict(_our_layers(model))
    if match == "order":
        if len(theirs) != len(ours):
            raise _checks.original_layers(len(theirs), len(ours))
        names = dict(zip(ours, theirs, strict=True))
    else:
        names = {path: _their_path(path, model) for path in ours}
        lost = [path for path, name in names.items() if name not in theirs]
        unknown = set(theirs).difference(names.values())
        if unknown or lost:
            raise _checks.original_names(sorted(unknown), lost)
    return {
        f"{path}.{name}".lstrip("."): value
        for path, layer in ours.items()
        for name, value in _translated(layer, theirs[names[path]], path).items()
    }


def _unwrapped(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    wrapped = all(key.startswith("module.") for key in state_dict)
    return {key.removeprefix("module.") if wrapped else key: value for key, value in state_dict.items()}


def _their_layers(state_dict: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The original's tensors by the path of their layer, in order; a dynamic layer is one."""
    dynamic = {key[: -len(m)] for key in state_dict for m in _MARKS if f".{key}".endswith(f".{m}")}
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in state_dict.items():
        parent = key[: key.rfind(".") + 1]
        start = next((p for p in dynamic if key.startswith(p)), parent)
        layers.setdefault(start.removesuffix("."), {})[key[len(start) :]] = value
    return layers


def _our_layers(module: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every layer that holds tensors, with its path, in order; a dynamic layer is one."""
    dynamic = _dialect(module) is not None
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if dynamic or own:
        yield path, module
    if not dynamic:
        for name, child in module.named_children():
            yield from _our_layers(child, f"{path}.{name}".lstrip("."))


def _their_path(path: str, model: nn.Module) -> str:
    """Path of a layer in the original, where a block with a shared router has no wrapper around it."""
    module, kept = model, []
    for part in path.split(".") if path else ():
        if isinstance(module, RoutedBlock) and part == "router":
            return ".".join([*kept, "routing_fn"])
        if not (isinstance(module, RoutedBlock) and part == "block"):
            kept.append(part)
        module = module.get_submodule(part)
    return ".".join(kept)


def _dialect(layer: nn.Module) -> _Dialect | None:
    return next((dialect for dialect in _DIALECTS if isinstance(layer, dialect.kinds)), None)


def _translated(layer: nn.Module, entries: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """One layer's tensors under our names, with our shapes."""
    dialect, own, result = _dialect(layer), layer.state_dict(), {}
    for theirs, value in entries.items():
        ours = theirs if dialect is None else dialect.translate(theirs)
        if ours not in own:
            raise _checks.original_entry(path, theirs, type(layer).__name__)
        if dialect is not None and ours.startswith(dialect.free):
            result[ours] = value.flatten(1) if value.dim() > 1 else value
            continue
        if value.numel() != own[ours].numel() or (dialect is None and value.shape != own[ours].shape):
            raise _checks.original_shape(path, theirs, value.shape, own[ours].shape)
        result[ours] = value.reshape(own[ours].shape)
    for linear in () if dialect is None else dialect.free:
        if f"{linear}.weight" in result:
            weight = result[f"{linear}.weight"]
            result.setdefault(f"{linear}.bias", weight.new_zeros(weight.shape[0]))
    return result


def _widen_(layer: nn.Module, path: str, translated: Mapping[str, Tensor]) -> None:
    """Give linear layers that are free in their width the width that the original has."""
    dialect = _dialect(layer)
    for name in () if dialect is None else dialect.free:
        weight = translated.get(f"{path}.{name}.weight".lstrip("."))
        linear = layer.get_submodule(name)
        if weight is not None and weight.shape != linear.weight.shape:
            made = {"device": linear.weight.device, "dtype": linear.weight.dtype}
            parent, _, leaf = name.rpartition(".")
            setattr(layer.get_submodule(parent), leaf, nn.Linear(weight.shape[1], weight.shape[0], **made))
