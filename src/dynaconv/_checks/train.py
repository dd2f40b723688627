"""Recipes, runs and checkpoints."""

from __future__ import annotations

from collections.abc import Sequence


def train_at_least(what: str, value: float, least: float) -> None:
    """Raise unless value >= least."""
    if not value >= least:
        raise ValueError(f"{what} must be at least {least:g}, got {value!r}")


def train_needs(what: str, missing: str, example: str) -> ValueError:
    """Error for a recipe section that makes no sense without another one."""
    return ValueError(
        f"{what} needs {missing} as well; add {missing}: {example} to the recipe, or leave {what} out"
    )


def train_not_yaml(path: object, reason: str) -> ValueError:
    """Error for a recipe file that cannot be read."""
    return ValueError(f"{path} is not a readable recipe: {reason}")


def train_wrong_type(origin: object, key: str, expected: str, got: object) -> ValueError:
    """Error for a recipe value of the wrong kind."""
    return ValueError(f"recipe key {key!r} expects {expected}, got {got!r} (in {origin})")


def train_no_checkpoint(path: object) -> FileNotFoundError:
    """Error for a run that has no checkpoint to continue from."""
    return FileNotFoundError(
        f"there is no checkpoint {str(path)!r} to continue from; start the run without --resume"
    )


def train_broken_checkpoint(path: object, error: Exception) -> ValueError:
    """Error for a checkpoint that is cut off or damaged."""
    reason = " ".join(str(error).split())[:120]
    return ValueError(
        f"checkpoint {path} is damaged or truncated ({type(error).__name__}: {reason}); "
        "put back a whole copy, or start again with --overwrite"
    )


def train_foreign_checkpoint(path: object) -> ValueError:
    """Error for a checkpoint that something else wrote."""
    return ValueError(
        f"{path} is not a checkpoint of a dynaconv run; start again with --overwrite, or name another run"
    )


def train_lower_lr(lr: float) -> str:
    """Advice for a training that overflowed."""
    return (
        f"most likely the learning rate {lr:g} is too high: lower optim.lr, or set optim.warmup_epochs or "
        "trainer.gradient_clip"
    )


def train_diverged(what: str, step: int, cause: str) -> str:
    """Message for a training that is no longer finite."""
    return (
        f"training stopped at step {step}: the {what} not finite; {cause} (the last good checkpoint is kept)"
    )


def train_run_exists(path: object) -> FileExistsError:
    """Error for a run folder that is in use."""
    return FileExistsError(
        f"{path} holds a run already; continue it with --resume, replace it with --overwrite, or name another folder"
    )


def train_other_recipe(path: object, key: str, there: object, here: object) -> ValueError:
    """Error for a run that is resumed with another recipe."""
    return ValueError(
        f"the run in {path} was started with {key} = {there!r}, but this recipe says {here!r}; "
        "resume it with the same recipe, or start a new run"
    )


def train_cannot_write(path: object, error: OSError) -> OSError:
    """Error for a run folder on a full or read-only disk."""
    clear = OSError(
        f"cannot write the run to {path}: {error.strerror}; free some space or name another folder"
    )
    clear.errno = error.errno
    return clear


def train_no_images() -> ValueError:
    """Error for an evaluation of nothing."""
    return ValueError(
        "evaluate got no images: the data set is empty or the loader is used up; pass a list or a DataLoader"
    )


def train_batch_size(got: int, processes: int) -> ValueError:
    """Error for a batch that cannot be shared evenly."""
    return ValueError(
        f"data.batch_size is shared by {processes} processes, so it must be a multiple of {processes}, got {got}"
    )


def train_few_classes(outputs: int, classes: int) -> ValueError:
    """Error for a network with fewer outputs than the data set has classes."""
    return ValueError(
        f"model.num_classes is {outputs}, but the data set has {classes} classes; "
        "leave model.num_classes out or raise it"
    )


def train_other_weights(path: object, tensors: Sequence[str]) -> ValueError:
    """Error for weights of another network."""
    return ValueError(
        f"the weights in {path} do not fit model.name: {len(tensors)} tensors differ, such as {min(tensors)!r}; "
        "start from a run of the same network and the same number of classes"
    )


def train_interrupted(epoch: int, epochs: int, done: int, step: int) -> str:
    """Message for a run that was stopped by Ctrl-C."""
    kept = f"the checkpoint of epoch {done} is whole" if done else "no epoch was completed yet"
    then = f"continues with epoch {done + 1}" if done else "starts again"
    return f"training interrupted in epoch {epoch} of {epochs} (step {step}); {kept}, --resume {then}"


def train_no_recipe_file(path: object, shipped: Sequence[str]) -> FileNotFoundError:
    """Error for a recipe file that is not there."""
    return FileNotFoundError(f"there is no recipe file {str(path)!r}; shipped recipes: {', '.join(shipped)}")


def train_bad_override(word: str) -> ValueError:
    """Error for a command line word that is not an override."""
    return ValueError(f"expected an override such as --budget.target 0.5, got {word!r}")


def train_override_without_value(key: str) -> ValueError:
    """Error for an override whose value is missing."""
    return ValueError(f"override --{key} has no value; write --{key} VALUE")


def train_lacks_name(origin: object, section: str) -> ValueError:
    """Error for a recipe without its two necessary names."""
    return ValueError(f"{origin} lacks {section}.name; a recipe names at least a model and a data set")


def train_not_a_folder(path: object) -> NotADirectoryError:
    """Error for a run folder that is a file."""
    return NotADirectoryError(f"{path} is a file; name a folder for the run")


def train_smoothing(value: float) -> ValueError:
    """Error for a label smoothing out of range."""
    return ValueError(f"trainer.label_smoothing must lie in [0, 1), got {value!r}")


def train_no_gpu(found: int, needed: int) -> ValueError:
    """Error for a GPU run without enough of them."""
    return ValueError(
        f"trainer.accelerator is gpu, which needs {needed} CUDA device(s), but torch sees {found}; "
        "set trainer.accelerator to auto or cpu"
    )


def train_ramp(value: float) -> ValueError:
    """Error for a ramp that never arrives."""
    return ValueError(
        f"budget.ramp must lie in [0, 1), got {value!r}; 0.3 lowers the target over the first 30 % of training"
    )


def train_foreign_option(method: str, options: Sequence[str], known: Sequence[str]) -> ValueError:
    """Error for an option of spatial masks in a recipe with other gates."""
    return ValueError(
        f"masking.{options[0]} is no option of {method}; it has {', '.join(known)} (those that masking lacks go into "
        "masking.options)"
    )
