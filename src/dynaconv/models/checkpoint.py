"""Saving and loading whole networks: config.json + model.safetensors, no pickle."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dynaconv._files import atomic_path, atomic_write_text
from dynaconv._version import __version__
from dynaconv.convert import config_from_dict, dynamic_layers, dynamize_, gates, masked_blocks
from dynaconv.convert.kernels import static_name
from dynaconv.models.cifar_resnet import CifarResNet
from dynaconv.models.dynamic.names import parse_name
from dynaconv.models.registry import create_model
from dynaconv.nn.dynamic_conv import DynamicLayer
from dynaconv.nn.routed_block import RoutedBlock
from dynaconv.nn.routers import Router

FORMAT = 1


def save(
    model: nn.Module,
    path: str | Path,
    *,
    arch: dict[str, Any] | str | None = None,
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a network to the folder `path` as config.json + model.safetensors (each whole or not at all).

    Args:
        arch: how to build the static network again: a name for `create_model`, or {"name": ..., options}. By default
            it is found out for our networks, timm's and torchvision's.
        metadata: JSON-ready facts to keep beside the network (classes, mean, std, ...).
    Returns:
        The folder.
    Raises:
        ValueError: the architecture cannot be found out; OSError: the folder cannot be written.
    """
    folder = Path(path)
    spec = {"name": arch} if isinstance(arch, str) else dict(arch) if arch else _infer_arch(model)
    conversion = _conversion(model, with_kernels=not _brings_kernels(spec["name"]))
    config = {
        "format": FORMAT,
        "dynaconv_version": __version__,
        "arch": spec,
        "conversion": conversion,
        "metadata": metadata or {},
    }
    state = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})
    atomic_write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return folder


def load(path: str | Path, *, model: nn.Module | None = None, num_classes: int | None = None) -> nn.Module:
    """Rebuild the network that `save` wrote, in evaluation mode.

    Args:
        path: the folder; a run folder (with model/ inside) works too.
        model: a static network to fill instead of building one (for architectures that are not in the registry).
        num_classes: what the caller will use; a mismatch with the saved classifier is an error that says so.
    Raises:
        FileNotFoundError: no saved network there. ValueError: damaged or foreign files, another number of classes.
    """
    folder = _model_folder(path)
    config = read_config(folder)
    state = _read_state(folder / "model.safetensors")
    saved_classes = config["arch"].get("num_classes")
    if num_classes is not None and saved_classes is not None and num_classes != saved_classes:
        raise ValueError(
            f"the network in {folder} has {saved_classes} classes, but {num_classes} are needed; "
            "use the data set it was trained on, or train a new one"
        )
    if model is None:
        model = _built(config["arch"], folder)
    if config["conversion"]:
        dynamize_(model, {name: config_from_dict(c) for name, c in config["conversion"].items()})
    _fill(model, state, folder)
    return model.eval()


def _built(arch: dict[str, Any], folder: Path) -> nn.Module:
    try:
        return create_model(**arch)
    except TypeError as error:
        raise ValueError(
            f"{folder / 'config.json'} asks for {arch['name']} with options that it does not take ({error}); "
            "correct them, or save the network again"
        ) from error


def _brings_kernels(name: str) -> bool:
    """The network of this name has dynamic layers from the start."""
    parsed = parse_name(name)
    return parsed is not None and parsed.method is not None


def _conversion(model: nn.Module, *, with_kernels: bool) -> dict[str, dict[str, Any]]:
    """Config of every masked block, and of every dynamic layer unless the architecture brings them, by static name."""
    found = {name: block.config for name, block in masked_blocks(model).items()}
    if with_kernels:
        found.update({name: layer.config for name, layer in dynamic_layers(model).items()})
    return {static_name(model, n): config.to_dict() for n, config in found.items() if config is not None}


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json of a saved network, checked.

    Raises:
        FileNotFoundError, ValueError: missing, damaged, or of another format.
    """
    file = _model_folder(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is damaged ({error}); save the network again") from None
    if (
        not isinstance(config, dict)
        or config.get("format") != FORMAT
        or not isinstance(config.get("arch"), dict)
    ):
        got = config.get("format") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{file} is not a dynaconv network of format {FORMAT} (got {got!r})")
    for where, key, kind in ((config["arch"], "name", str), (config, "conversion", dict)):
        if not isinstance(where.get(key), kind):
            raise ValueError(f"{file} is damaged ({key!r} must be a {kind.__name__}); save the network again")
    return config


def _model_folder(path: str | Path) -> Path:
    folder = Path(path)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise FileNotFoundError(
        f"no saved network in {folder}: expected config.json and model.safetensors, or model/ with them"
    )


def _read_state(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; a saved network is config.json + model.safetensors")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged or truncated ({error}); copy it again or use another checkpoint"
        ) from None


def _fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    own = model.state_dict()
    missing, foreign = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or foreign:
        raise ValueError(
            f"the weights in {folder} do not fit {type(model).__name__}: "
            f"{len(missing)} missing (such as {missing[:2]}), "
            f"{len(foreign)} unknown (such as {foreign[:2]})"
        )
    for name, value in state.items():
        if own[name].shape != value.shape and not name.endswith("budget_table"):
            raise ValueError(
                f"{name} in {folder} has shape {list(value.shape)}, the network needs {list(own[name].shape)}; "
                "was it trained for another number of classes?"
            )
    # Modules that read older states ask by which version of them a state was written.
    versioned = OrderedDict(state)
    versioned._metadata = own._metadata
    model.load_state_dict(versioned)


def _infer_arch(model: nn.Module) -> dict[str, Any]:
    """Name and options that rebuild the static network, verified by comparing keys and shapes."""
    own = getattr(model, "arch", None)
    if isinstance(own, dict) and _shapes_of(own) == _unmasked_shapes(model):
        return own
    if isinstance(model, CifarResNet):
        return _cifar_arch(model)
    cfg = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else None
    module = type(model).__module__
    if name:
        candidates = [{"name": f"timm:{name}", **_timm_options(model)}]
    elif module.startswith("torchvision.models."):
        candidates = [{"name": n, **_classes(model)} for n in _torchvision_candidates(module)]
    else:
        candidates = []
    shapes = _static_shapes(model)
    converted = [f"{static_name(model, name)}." for name in dynamic_layers(model)]
    for arch in candidates:
        built = _shapes_of(arch)
        if {k: v for k, v in built.items() if not any(k.startswith(c) for c in converted)} == shapes:
            return arch
    raise ValueError(
        f"cannot tell how to rebuild this {type(model).__name__}; pass arch='NAME' or arch={{'name': ..., options}} of "
        "dc.create_model to dc.save; or any name of your own, and give dc.load the static network as model="
    )


def _cifar_arch(model: CifarResNet) -> dict[str, Any]:
    depth = 6 * len(model.layer1) + 2
    in_chans, image_size, _ = model.input_size
    width, stride = model.conv1.out_channels, model.conv1.stride[0]
    options = {"num_classes": model.num_classes, "in_chans": in_chans}
    if (width, stride, model.pool, image_size) == (16, 1, "avg", 32) and depth in (8, 14, 20, 26, 32):
        return {"name": f"resnet{depth}_cifar", **options}
    if depth in (8, 14):
        return {
            "name": f"resnet{depth}_scenes",
            **options,
            "width": width,
            "stem_stride": stride,
            "pool": model.pool,
            "image_size": image_size,
        }
    return {
        "name": f"resnet{depth}_cifar",
        **options,
        "width": width,
        "stem_stride": stride,
        "pool": model.pool,
        "image_size": image_size,
    }


def _timm_options(model: nn.Module) -> dict[str, Any]:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return {**_classes(model), "in_chans": 3 if first is None else first.in_channels}


def _classes(model: nn.Module) -> dict[str, Any]:
    deciding = [*gates(model).values(), *(m for m in model.modules() if isinstance(m, DynamicLayer | Router))]
    inside = {m for part in deciding for m in part.modules() if m is not part}
    heads = [m for m in model.modules() if hasattr(m, "out_features") and m not in inside]
    return {"num_classes": heads[-1].out_features} if heads else {}


def _torchvision_candidates(module: str) -> list[str]:
    """Names that torchvision builds in the same module."""
    from dynaconv.integrations.torchvision import import_torchvision

    models = import_torchvision().models
    names = models.list_models(module=models)
    return [f"torchvision:{n}" for n in names if models.get_model_builder(n).__module__ == module]


def _unmasked_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the network without its gates, by the names it had before they came."""
    gated = [f"{name}.gate." for name in masked_blocks(model)]
    state = {k: v for k, v in model.state_dict().items() if not any(k.startswith(g) for g in gated)}
    inside = {f"{name}.block.": f"{name}." for name in masked_blocks(model)}
    shapes = {}
    for key, value in state.items():
        owner = next((b for b in inside if key.startswith(b)), None)
        shapes[key if owner is None else inside[owner] + key[len(owner) :]] = tuple(value.shape)
    return shapes


def _static_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of the static network, its dynamic layers left out (their weights look different)."""
    dynamic = [f"{name}." for name in dynamic_layers(model)]
    routers = [f"{n}.router." for n, m in model.named_modules() if isinstance(m, RoutedBlock)]
    shapes = {}
    for key, value in model.state_dict().items():
        gate = any(key.startswith(f"{name}.gate.") for name in masked_blocks(model))
        if not gate and not any(key.startswith(p) for p in (*dynamic, *routers)):
            shapes[static_name(model, key.rpartition(".")[0]) + "." + key.rpartition(".")[2]] = tuple(
                value.shape
            )
    return shapes


def _shapes_of(arch: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    import torch

    try:
        with torch.device("meta"):
            built = create_model(**arch)
    except (TypeError, ValueError, RuntimeError):
        return {}
    return {k: tuple(v.shape) for k, v in built.state_dict().items()}
