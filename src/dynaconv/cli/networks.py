"""Networks as the command line names them: a run folder, a saved network, or a name of `dynaconv models`."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dynaconv import _checks


@dataclass
class Opened:
    """A network that was named on the command line.

    folder: the run or model folder, None for a network by name (which then has random weights);
    metadata: what the run keeps beside its weights (classes, mean, std, image_size, dataset); arch: how it is built.
    """

    name: str
    model: nn.Module
    folder: Path | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    arch: dict[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int | None:
        """Outputs of the network, None where it does not say."""
        return self.arch.get("num_classes", getattr(self.model, "num_classes", None))

    @property
    def model_folder(self) -> Path:
        """The folder with config.json and model.safetensors."""
        assert self.folder is not None
        return self.folder / "model" if (self.folder / "model").is_dir() else self.folder

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C, H, W) of the pictures it was made for."""
        from dynaconv.cost import guess_input_size

        channels, height, width = guess_input_size(self.model)
        side = self.metadata.get("image_size")
        return (channels, side, side) if side else (channels, height, width)


def open_network(name: str, num_classes: int | None = None, pretrained: bool = False) -> Opened:
    """A run, a saved network or a network by name, in evaluation mode.

    Raises:
        ValueError: an unknown name (the nearest are named), damaged files.
        FileNotFoundError: a folder without a network.
    """
    from dynaconv import create_model, list_models

    folder = Path(name)
    if folder.exists():
        return open_run(folder)
    external = name.startswith(("timm:", "torchvision:"))
    if not external and (os.sep in name or name.startswith(".")):
        raise _checks.cli_no_folder(folder, _siblings(folder))
    if not external and name not in list_models():
        raise _checks.unknown(
            "model", name, list_models(), "(or name a run folder, timm:NAME or torchvision:NAME)"
        )
    return Opened(name, create_model(name, num_classes=num_classes, pretrained=pretrained).eval())


def open_run(path: str | Path) -> Opened:
    """A run folder or a folder that `dc.save` wrote.

    Raises:
        FileNotFoundError: no such folder, or no network in it. ValueError: damaged files.
    """
    from dynaconv import load
    from dynaconv.models import read_config

    folder = Path(path)
    if not folder.exists():
        raise _checks.cli_no_folder(folder, _siblings(folder))
    if not folder.is_dir():
        raise _checks.cli_not_a_folder(folder, folder)
    model, config = load(folder), read_config(folder)
    return Opened(str(folder), model, folder, dict(config.get("metadata") or {}), dict(config["arch"]))


def _siblings(folder: Path) -> list[str]:
    """Folders beside it that look alike."""
    beside = folder.parent
    names = [p.name for p in beside.iterdir() if p.is_dir()] if beside.is_dir() else []
    return [str(beside / name) for name in _checks.nearest(folder.name, names)]


def check_input_size(size: tuple[int, int, int], model: nn.Module) -> None:
    """Raise where a picture has another number of channels than the network takes, or no pixels."""
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if min(size) < 1:
        raise _checks.cli_input_size(size)
    if first is not None and size[0] != first.in_channels:
        raise _checks.cli_channels(size, first.in_channels)


def choose_targets(model: nn.Module, asked: list[float] | None) -> list[float | None]:
    """The budgets asked for, or all that the network is calibrated for; [None] is the network as it is.

    Raises:
        ValueError: a budget outside (0, 1] or the calibrated range, or of a network that is static or not calibrated.
    """
    import dynaconv as dc

    known = dc.calibrated_targets(model)
    if not asked:
        return list(known) or [None]
    for target in asked:
        _checks.fraction("--target", target)
    if not dc.gates(model):
        raise _checks.no_gates("--target")
    for target in asked:
        if target != 1.0 and not known:
            raise _checks.cli_not_calibrated()
        if target != 1.0 and not known[0] <= target <= known[-1]:
            raise _checks.cli_target_range(target, known)
    return sorted(set(asked))


def set_target(model: nn.Module, target: float | None) -> None:
    """Turn a dynamic network to a budget; None leaves it as it is."""
    import dynaconv as dc

    if target is not None:
        dc.set_budget_(model, target)


def need_static_name(asked: str | None) -> None:
    """Raise ValueError unless a study knows this network; None asks for the study's own."""
    from dynaconv import list_models

    if asked is not None and not asked.startswith(("timm:", "torchvision:")) and asked not in list_models():
        raise _checks.unknown("network", asked, list_models())
