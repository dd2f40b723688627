"""Studies."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from dynaconv._checks.general import _some


def study_thresholds(got: Sequence[float]) -> ValueError:
    """Error for correlation buckets that overlap."""
    return ValueError(
        "--thresholds expects three falling numbers in (0, 1] for strong, middle and weak, such as 0.5 0.3 0.1, "
        f"got {' '.join(f'{v:g}' for v in got)}"
    )


def study_nothing_varies(rows: int, images: int) -> ValueError:
    """Error for a correlation without a single pair."""
    return ValueError(
        f"nothing to correlate: in none of {images} images do two of the {rows} rows vary; "
        "choose another --layer, or a network whose units are alive"
    )


def study_damaged(path: object, reason: str) -> ValueError:
    """Error for a study's file that cannot be read."""
    return ValueError(
        f"{path} is damaged ({reason}); remove it, or start the study in another folder with --out"
    )


def study_foreign_folder(path: object, study: str) -> ValueError:
    """Error for an output folder that holds something else."""
    return ValueError(
        f"{str(path)!r} holds files that are not a {study} study; they are left alone: name another folder with --out"
    )


def study_other_study(path: object, found: object, study: str) -> ValueError:
    """Error for an output folder of another study."""
    return ValueError(
        f"{str(path)!r} belongs to the study {found!r}, not to {study!r}; name another folder with --out"
    )


def study_busy(path: object, holder: str) -> ValueError:
    """Error for a folder in which another process works."""
    who = f"process {holder}" if holder else "another process"
    return ValueError(
        f"{who} is working in the study folder {str(path)!r}, and two would mix their results; wait until it has "
        "finished or stop it (what it has finished stays), or name another folder with --out"
    )


def study_other_settings(path: object, key: str, there: object, here: object) -> ValueError:
    """Error for a study that is continued with other settings."""
    return ValueError(
        f"the study in {path} was started with {key} = {there!r}, but now it is {here!r}; its rows would not be "
        "comparable: use the same settings, or another folder with --out"
    )


def study_none_given(option: str, known: Sequence[str]) -> ValueError:
    """Error for an empty list."""
    return ValueError(f"{option} needs at least one name; known: {', '.join(known)}")


def study_share(option: str, got: float) -> ValueError:
    """Error for a share out of range."""
    return ValueError(f"{option} is a share and must lie in [0, 1], got {got:g}")


def study_which(known: Iterable[str]) -> ValueError:
    """Error for a study that is not named."""
    return ValueError(f"which study? name one of {', '.join(known)}; see `dynaconv study --help`")


def study_no_stages(network: str) -> ValueError:
    """Error for a network whose stages are not found."""
    return ValueError(f"cannot tell the stages of {network}; name a layer with --layer")


def study_no_dynamic_layers(network: str) -> ValueError:
    """Error for a static network where a dynamic one is needed."""
    return ValueError(
        f"{network} has no dynamic kernels; name a network made by dc.dynamize_(model, dc.DYConv()) "
        "or a dynamic one of `dynaconv models`"
    )


def study_no_dynamic_stage(stage: str, known: Sequence[str]) -> ValueError:
    """Error for a stage without dynamic convolutions."""
    return ValueError(
        f"{stage!r} holds no dynamic convolution; choose another --layer, or a --kernel-layer: {_some(known)}"
    )


def study_not_feature_map(name: str, got: object) -> ValueError:
    """Error for a layer whose output cannot be correlated."""
    shown = list(got) if isinstance(got, torch.Size) else got
    return ValueError(f"the output of {name!r} must be [N, C, H, W], got {shown}; choose another --layer")


def study_no_partner(name: str, stage: str) -> ValueError:
    """Error for a dynamic convolution without a static counterpart."""
    return ValueError(
        f"the static network has no convolution like {name!r} in {stage!r}; name one with --static-kernel-layer"
    )


def study_not_finite() -> str:
    """Reason for a row without a result: the network overflows in evaluation."""
    return (
        "the trained network's answers on the test pictures are not finite; "
        "train longer, so that its batch norms settle, or lower the learning rate"
    )


def study_no_coefficients() -> ValueError:
    """Error for a network whose dynamic layers never ran by themselves."""
    return ValueError(
        "none of the dynamic layers was called, so there are no coefficients to study; "
        "inside masked blocks set backend='eager' first"
    )


def study_few_budgets(budgets: Sequence[float]) -> ValueError:
    """Error for a range without anything in it."""
    return ValueError(
        f"a study of the dial needs three budgets or more, got {len(budgets)}; such as --budgets 0.2 0.5 0.8"
    )


def study_twice(option: str, values: Sequence[object]) -> ValueError:
    """Error for a list that names something twice."""
    twice = next(value for value in values if list(values).count(value) > 1)
    return ValueError(f"{option} names {twice} twice; name it once")


def study_no_widths(network: str) -> ValueError:
    """Error for widths of a network that has no such option."""
    return ValueError(
        f"{network} has no width to change; leave --widths out, or take one of dynaconv's ResNets with --network"
    )


def study_method_unfit(method: str, network: str, reason: object) -> ValueError:
    """Error for a method that a network has no place for."""
    return ValueError(f"{method} does not fit {network}: {reason}; leave it out of --methods")
