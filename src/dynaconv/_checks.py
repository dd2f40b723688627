"""Every user-facing error message of the package: what was expected, what came, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Known names that look like `name`, best first."""
    return difflib.get_close_matches(name, list(known), n=count, cutoff=0.5)


def unknown(what: str, name: str, known: Iterable[str], hint: str = "") -> ValueError:
    """Error for a name that is not known, with the nearest ones."""
    known = sorted(known)
    close = nearest(name, known)
    advice = f"did you mean {' or '.join(repr(c) for c in close)}?" if close else _some(known)
    return ValueError(f"unknown {what} {name!r}; {advice}{' ' + hint if hint else ''}")


def _some(known: Sequence[str], count: int = 12) -> str:
    listed = ", ".join(known[:count])
    return f"known: {listed}{', ...' if len(known) > count else ''}"


def one_of(what: str, value: str, allowed: Sequence[str]) -> None:
    """Raise unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown(what, str(value), allowed)


def images(x: Tensor, channels: int | None = None, who: str = "this layer") -> None:
    """Raise unless x is a floating [N, C, H, W] tensor (with the given C)."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{who} expects a tensor [N, C, H, W], got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"{who} expects x [N, C, H, W], got {list(x.shape)}; add the missing axis")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(
            f"{who} expects x [N, {channels}, H, W], got {list(x.shape)}; "
            f"its channel count must be {channels}, not {x.shape[1]}"
        )


def mask_for(mask: Tensor, size: Sequence[int]) -> None:
    """Raise unless mask is [N, 1, h, w] on the output grid `size` = (N, h, w)."""
    n, h, w = (int(v) for v in size)
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor [N, 1, H, W] = [{n}, 1, {h}, {w}], got {type(mask).__name__}")
    if tuple(mask.shape) != (n, 1, h, w):
        raise ValueError(
            f"mask must be [N, 1, H, W] = [{n}, 1, {h}, {w}] to match the output, got {list(mask.shape)}; "
            "use SpatialMask.resize or MaskUnit(stride=1)"
        )


def fraction(what: str, value: float) -> float:
    """Raise unless 0 < value <= 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{what} must be a number in (0, 1], got {value!r}") from None
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{what} must lie in (0, 1], got {number:g}; 0.5 means half of the conditional MACs")
    return number


def positive(what: str, value: float) -> float:
    """Raise unless value > 0."""
    if not float(value) > 0:
        raise ValueError(f"{what} must be positive, got {value!r}")
    return value


def grad_free_backend(op: str, backend: str, reason: str) -> RuntimeError:
    """Error for an explicitly chosen backend that cannot run."""
    return RuntimeError(f"{op}: backend {backend!r} cannot run here: {reason}; use backend='auto' or 'eager'")


def no_gates(what: str) -> ValueError:
    """Error for a network without anything dynamic in it."""
    return ValueError(
        f"{what} needs a dynamic network, but this model has no gates; call dc.dynamize_(model) first"
    )


def finite_mask(mask: Tensor) -> None:
    """Raise when a mask holds NaN."""
    if mask.is_floating_point() and bool(torch.isnan(mask).any()):
        raise ValueError(
            "mask holds NaN; the network's input or weights are not finite: check them with torch.isnan"
        )


def report_no_results(run_dir: object) -> FileNotFoundError:
    """Error for a run folder without results.json."""
    return FileNotFoundError(
        f"a report needs results.json, but {str(run_dir)!r} has none; run `dynaconv eval {run_dir}` first"
    )


def report_broken_json(path: object, error: Exception) -> ValueError:
    """Error for a results file that is not valid JSON."""
    return ValueError(
        f"{path} is not valid JSON ({error}); it may be cut off: write it again with `dynaconv eval`"
    )


def report_unknown_format(path: object, got: object, known: int) -> ValueError:
    """Error for a results file of another format number."""
    return ValueError(
        f"{path} has format {got!r}, but this dynaconv reads format {known}; "
        "write it again with `dynaconv eval` or update dynaconv"
    )


def report_bad_field(path: object, field: str, expected: str, got: object) -> ValueError:
    """Error for a value of the wrong kind in a results file."""
    shown = repr(got) if len(repr(got)) <= 60 else repr(got)[:57] + "..."
    return ValueError(f"{path}: {field} must be {expected}, got {shown}; write it again with `dynaconv eval`")


def report_no_gallery(path: object) -> FileNotFoundError:
    """Error for a gallery file that is not there."""
    return FileNotFoundError(f"no gallery at {str(path)!r}; expected a gallery.npz written by dynaconv")


def report_broken_gallery(path: object, error: Exception) -> ValueError:
    """Error for a gallery that numpy cannot read."""
    return ValueError(
        f"{path} is not a readable gallery ({type(error).__name__}: {error}); it may be cut off: write it again"
    )


def report_gallery_lacks(path: object, key: str) -> ValueError:
    """Error for a gallery without one of its arrays."""
    return ValueError(f"{path} has no array {key!r}, so it is not a whole gallery; write it again")


def report_gallery_shape(path: object, key: str, expected: object, got: object) -> ValueError:
    """Error for a gallery whose arrays disagree."""
    return ValueError(
        f"{path}: {key} must be {expected} to match the pictures, got {got}; write the gallery again"
    )


def report_other_run(path: object, what: str, known: Sequence[str]) -> ValueError:
    """Error for a gallery that belongs to other results."""
    return ValueError(
        f"{path} has {what}, but results.json beside it has {_some(known)}; "
        "they come from different runs: write both again"
    )


def report_no_runs() -> ValueError:
    """Error for a comparison of nothing."""
    return ValueError("a comparison needs at least one run folder, got none; name the folders to compare")


def integrations_missing(package: str, extra: str) -> ImportError:
    """Error for an optional package that is not installed."""
    return ImportError(
        f'{package} is not installed; install it with: pip install "dynaconv[{extra}]"', name=package
    )


def report_missing_package(name: str | None) -> ModuleNotFoundError:
    """Error for a report asked for without the packages that draw it."""
    return ModuleNotFoundError(
        f"a report needs the package {name!r}; install it with `pip install 'dynaconv[report]'`"
    )


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
        "bench a dynamic network such as dynconv_resnet8_scenes or a trained run, or add --dynamize"
    )


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


def fusion_shape(what: str, got: Sequence[int], expected: Sequence[int], layout: str = "") -> None:
    """Raise unless a part of a channel fusion has the expected sizes."""
    if tuple(got) != tuple(expected):
        layout = f" ({layout})" if layout else ""
        raise ValueError(
            f"channel fusion: {what}{layout} must end in {list(expected)}, got {list(got)}; "
            "O comes from weight and L from q"
        )


def fusion_foldable(groups: int, absorbable: bool) -> None:
    """Raise unless a channel fusion can be folded to one kernel for each image."""
    if groups != 1:
        raise ValueError(
            f"form 'folded' cannot run with groups={groups}: the dynamic part is dense over channels "
            "and does not fit into a grouped kernel; use form='factored'"
        )
    if not absorbable:
        raise ValueError(
            "form 'folded' needs norms as Affine (evaluation mode): batch statistics cannot be folded into a "
            "kernel; use form='factored', or call eval()"
        )


def fusion_ungrouped(kernel_channels: int, channels: int) -> None:
    """Raise unless a kernel reads all channels, as the dynamic part does."""
    if kernel_channels != channels:
        fusion_foldable(channels // max(kernel_channels, 1), True)


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


def count(what: str, value: int) -> None:
    """Raise unless `value` is a whole number >= 1."""
    if isinstance(value, bool) or int(value) != value or value < 1:
        raise ValueError(f"{what} must be a whole number >= 1, got {value!r}")


def channels_and_groups(who: str, in_channels: int, out_channels: int, groups: int) -> None:
    """Raise unless both channel counts are positive and divisible by `groups`."""
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        count(f"{who}: {name}", value)
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
        if value % groups:
            raise ValueError(f"{who}: {name} must be divisible by groups, got {value} and groups={groups}")


def input_of(who: str, x: Tensor, channels: int, dims: int) -> None:
    """Raise unless x is [B, channels, *size] with `dims` axes of size."""
    _shape_of(who, x.shape, channels, dims)


def _shape_of(who: str, shape: Sequence[int], channels: int, dims: int) -> None:
    if len(shape) != dims + 2 or shape[1] != channels:
        axes = ("L", "H, W", "D, H, W")[dims - 1]
        raise ValueError(f"{who} expects x [B, {channels}, {axes}], got {list(shape)}")


def features(who: str, x: Tensor, channels: int) -> None:
    """Raise unless x is [B, channels]."""
    if x.dim() != 2 or x.shape[1] != channels:
        raise ValueError(
            f"{who} expects x [B, {channels}], got {list(x.shape)}; pool and flatten feature maps first"
        )


def routing(who: str, got: Tensor, expected: Sequence[int]) -> None:
    """Raise unless the coefficients have the expected shape."""
    if tuple(got.shape) != tuple(expected):
        raise ValueError(
            f"{who}: routing must be {list(expected)} (batch first), got {list(got.shape)}; layer.route(x) makes it"
        )


def experts(x: Sequence[int], weight: Sequence[int], coefficients: Sequence[int], groups: int) -> None:
    """Raise unless the shapes of x, the experts' weight and the coefficients fit."""
    dims = len(weight) - 3
    if dims not in (1, 2, 3):
        raise ValueError(
            f"experts must be [K, O, I/g, *kernel] with 1 to 3 kernel axes, got a weight of shape {list(weight)}"
        )
    _shape_of("dynamic_conv2d", x, weight[2] * groups, dims)
    if weight[1] % groups:
        raise ValueError(f"output channels must be divisible by groups, got {weight[1]} and groups={groups}")
    b, k = x[0], weight[0]
    if tuple(coefficients) not in ((b, k), (b, weight[1], k)):
        raise ValueError(
            f"routing must be [B, K] = [{b}, {k}] or [B, O, K] = [{b}, {weight[1]}, {k}], got {list(coefficients)}"
        )


def sample_kernels(x: Tensor, kernels: Tensor, groups: int) -> None:
    """Raise unless there is one kernel [O, I/g, *kernel] for every sample of x."""
    dims = kernels.dim() - 3
    if dims not in (1, 2, 3) or kernels.shape[0] != x.shape[0]:
        raise ValueError(
            f"kernels must be [B, O, I/g, *kernel] with B = {x.shape[0]} as in x, got {list(kernels.shape)}"
        )
    input_of("per_sample_conv", x, kernels.shape[2] * groups, dims)


def execution_cannot_run(execution: str, reason: str, able: Sequence[str]) -> ValueError:
    """Error for an explicit strategy that cannot run for this shape."""
    return ValueError(f"execution={execution!r} cannot run here: {reason}; use {', '.join(able)} or auto")


def no_router(who: str) -> ValueError:
    """Error for a layer that needs coefficients from outside."""
    return ValueError(
        f"this {who} has no router of its own; pass routing= (its block makes it) or build it with router=True"
    )


def not_convertible(who: str, expected: str, got: object) -> TypeError:
    """Error for `from_conv` on something that is not a plain static convolution."""
    path, kind = type(got).__module__, type(got).__name__
    if path.startswith("dynaconv."):
        kind = f"dynaconv.{kind}"
    elif kind == expected:
        kind = f"{path}.{kind}"
    hint = "convert a static convolution; transposed, quantised, lazy and already dynamic layers are not"
    return TypeError(f"{who}.from_conv expects a plain nn.{expected}, got {kind}: {hint}")


def not_foldable(norm: object) -> TypeError:
    """Error for a normalisation that has no running statistics."""
    return TypeError(
        f"only a batch norm with running statistics folds into a convolution, got {type(norm).__name__}"
    )


def cannot_route(block: str, reason: str) -> ValueError:
    """Error for a block whose forward cannot be given coefficients from outside."""
    return ValueError(
        f"a router cannot be shared inside this {block}: {reason}; give every layer its own with routing='layer'"
    )


def layer_used_twice(name: str, names: Sequence[str]) -> ValueError:
    """Error for converting a layer that several places of a network share."""
    return ValueError(
        f"{name} is one layer used in {len(names)} places ({', '.join(names)}); "
        "give each place its own copy before making it dynamic"
    )


def already_dynamic(name: str, kind: str) -> ValueError:
    """Error for converting a dynamic layer again."""
    return ValueError(
        f"{name} is dynamic already ({kind}); call dc.revert_ first, or leave it out of the rules"
    )


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


def noise_free(who: str, noise: float, init: str) -> None:
    """Raise where noise between the experts would make a conversion inexact."""
    if noise and init == "exact":
        raise ValueError(
            f"{who}.from_conv is exact only without noise, got noise={noise:g}; leave noise out, or use init='fresh'"
        )


def two_routers(block: str) -> ValueError:
    """Error for two configs that both want to share a router in one block."""
    return ValueError(
        f"two configs want to share a router inside {block}; use one config there, or routing='layer' in one of them"
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


def weightnet_blocks(coefficients: int, blocks: int, row_blocks: int, row: int) -> None:
    """Raise unless a kernel's rows can be generated block by block."""
    if coefficients % blocks:
        raise ValueError(
            f"num_coefficients={coefficients} must be divisible by num_blocks={blocks}: every block has as many"
        )
    if row % row_blocks:
        raise ValueError(
            f"num_blocks={blocks} must divide the {row} weights of one output channel (in_channels / groups * taps); "
            "use num_blocks=1"
        )


def fuse_in_training() -> ValueError:
    """Error for folding batch norms that still normalise by the batch."""
    return ValueError("fuse_ folds batch norm as it is in evaluation mode; call model.eval() first")


def cannot_fuse(model: str, error: object) -> ValueError:
    """Error for a network whose data flow cannot be read."""
    return ValueError(
        f"the forward of {model} cannot be traced ({error}), so it is not known which batch norm follows which "
        "convolution; fold them with layer.fold_norm_(norm)"
    )


def original_layers(theirs: int, ours: int) -> ValueError:
    """Error for weights of a network with another number of layers."""
    return ValueError(
        f"the original has {theirs} layers and this network {ours}, so they cannot be paired in order; "
        "build the same network, with the same number of kernels and the same dynamic layers"
    )


def original_names(unknown: Sequence[str], lost: Sequence[str]) -> ValueError:
    """Error for weights of a network that names its layers differently."""
    parts = [f"no layer {unknown[0]!r} here ({len(unknown)} in all)"] if unknown else []
    parts += [f"no layer {lost[0]!r} there ({len(lost)} in all)"] if lost else []
    return ValueError(
        f"the original's layers are named differently: {', and '.join(parts)}; "
        "use match='order' where the layers come in the same order"
    )


def original_entry(path: str, name: str, kind: str) -> ValueError:
    """Error for a tensor that a layer does not have."""
    return ValueError(
        f"the original has {name!r} for layer {path!r}, which {kind} does not have; build the same layer"
    )


def original_shape(path: str, name: str, theirs: Sequence[int], ours: Sequence[int]) -> ValueError:
    """Error for a tensor of another size."""
    return ValueError(
        f"the original's {name!r} for layer {path!r} is {list(theirs)}, but {list(ours)} is needed; "
        "build the layer with the original's sizes, such as its number of kernels and its reduction"
    )


def original_lacks(missing: Sequence[str]) -> ValueError:
    """Error for tensors that an original does not have."""
    return ValueError(
        f"the original lacks {missing[0]!r} ({len(missing)} tensors in all); build the same layer, "
        "for example with the same bias and the same norms"
    )
