"""The command line."""

from __future__ import annotations

from collections.abc import Sequence


def cli_not_a_folder(path: object, file: object) -> ValueError:
    """Error for an output folder that is a file, or lies below one."""
    where = "it is a file" if str(path) == str(file) else f"{str(file)!r} is a file"
    return ValueError(f"{str(path)!r} cannot be a folder: {where}; name another folder")


def cli_not_writable(path: object) -> ValueError:
    """Error for an output folder without permission."""
    return ValueError(f"{str(path)!r} cannot be written: no permission; name another folder")


def cli_foreign_folder(path: object) -> ValueError:
    """Error for an output folder that holds something else than a run."""
    return ValueError(
        f"{str(path)!r} holds files that are not a dynaconv run; they are left alone: name another folder with --out"
    )


def cli_no_folder(path: object, similar: Sequence[str]) -> FileNotFoundError:
    """Error for a run folder that does not exist."""
    advice = f"did you mean {similar[0]!r}?" if similar else "`dynaconv demo` or `dynaconv train` makes one"
    return FileNotFoundError(f"there is no folder {str(path)!r}; {advice}")


def cli_input_size(size: Sequence[int]) -> ValueError:
    """Error for a picture without pixels."""
    return ValueError(
        f"--input-size expects three numbers C H W of 1 or more, such as 3 224 224, got {' '.join(map(str, size))}"
    )


def cli_channels(size: Sequence[int], channels: int) -> ValueError:
    """Error for a picture with another number of channels than the network takes."""
    return ValueError(
        f"the network takes {channels} channels, got a picture of {size[0]}; "
        f"write --input-size {channels} {size[1]} {size[2]}"
    )


def cli_refused_input(size: Sequence[int], error: Exception) -> ValueError:
    """Error for a picture that a network cannot take."""
    reason = " ".join(str(error).split())[:160]
    return ValueError(
        f"the network does not accept a picture of {'x'.join(map(str, size))} ({reason}); try another --input-size"
    )


def cli_target_range(target: float, known: Sequence[float]) -> ValueError:
    """Error for a budget that the network is not calibrated for."""
    listed = ", ".join(f"{t:g}" for t in known)
    return ValueError(
        f"--target {target:g} is outside the calibrated budgets ({listed}); "
        f"calibrate for it first: dynaconv eval RUN --calibrate {target:g} {' '.join(f'{t:g}' for t in known)}"
    )


def cli_not_calibrated() -> ValueError:
    """Error for a budget asked of a network without calibration."""
    return ValueError(
        "this network is not calibrated, so it has no budgets to choose from; "
        "run `dynaconv eval RUN --calibrate 0.3 0.5 0.7`, or leave --target out"
    )


def cli_at_least(option: str, value: float, least: float) -> None:
    """Raise unless value >= least."""
    if value < least:
        raise ValueError(f"{option} must be at least {least:g}, got {value:g}")


def cli_rules_not_json(text: str, reason: str) -> ValueError:
    """Error for conversion rules that are not JSON."""
    shown = text if len(text) <= 60 else text[:57] + "..."
    return ValueError(
        f"--rules expects JSON or a JSON file that maps module names to configs or null, got {shown!r}: {reason}"
    )


def cli_other_classes(name: object, network: Sequence[str] | int, data: Sequence[str]) -> ValueError:
    """Error for a data set with another number of classes than the network."""
    outputs = network if isinstance(network, int) else len(network)
    return ValueError(
        f"the network tells {outputs} classes apart, but data set {str(name)!r} has {len(data)}; "
        "use the data set it was trained on, or train a network for this one"
    )


def cli_no_data_known(name: object) -> ValueError:
    """Error for a network that does not say what it was trained on."""
    return ValueError(
        f"{name} does not say which data set it belongs to; name one with --data, such as --data scenes"
    )


def cli_no_pictures(paths: Sequence[object]) -> ValueError:
    """Error for folders and files without a readable picture."""
    return ValueError(
        f"no readable picture in {', '.join(str(p) for p in paths)}; "
        "expected files such as .png, .jpg, .webp, or a folder of them"
    )


def cli_no_picture_file(path: object) -> FileNotFoundError:
    """Error for a picture that is not there."""
    return FileNotFoundError(f"there is no picture {str(path)!r}; name image files or a folder of them")


def cli_needs_run(name: str, verb: str) -> ValueError:
    """Error for a network by name where a trained one is needed."""
    return ValueError(
        f"{verb} needs a trained network: a run folder such as runs/demo, not the name {name!r}"
    )


def cli_nothing_to_explain(name: str) -> ValueError:
    """Error for an explanation of a static network."""
    return ValueError(
        f"{name} is static: it computes everything everywhere; explain a dynamic network, such as runs/demo"
    )


def cli_no_normalisation(name: str) -> ValueError:
    """Error for a network that does not say how its pictures were normalised."""
    return ValueError(
        f"{name} does not say how its pictures are normalised; save it with dc.save(model, path, "
        'metadata={"mean": [...], "std": [...], "classes": [...]})'
    )


def cli_already_static(name: str) -> ValueError:
    """Error for a comparison of a static network with itself."""
    return ValueError(
        f"{name} is static, so there is nothing to skip; "
        "add --force-density 0.5 to see what masks would buy, or --dynamize, or bench a trained run"
    )


def cli_density(option: str, density: float) -> ValueError:
    """Error for a density of masks that is no share."""
    return ValueError(
        f"{option}: density must lie in [0, 1], got {density:g}; 0.5 opens half of the positions"
    )


def cli_no_classes(name: object, metric: str) -> ValueError:
    """Error for a network whose answers are no classes."""
    return ValueError(
        f"{name} is judged by {metric}, and explain shows classes and keypoints; use dynaconv eval or dc.collect_masks"
    )


def cli_explain_mixed(word: str) -> ValueError:
    """Error for pictures of the test split among files."""
    return ValueError(
        f"{word} stands alone: name either image files and folders, or test:N for the run's own pictures"
    )
