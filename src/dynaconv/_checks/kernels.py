"""Dynamic kernels: layers, routers, conversion, weights of the originals."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dynaconv._checks.general import count


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


def no_parent(kind: str) -> ValueError:
    """Error for replacing the model itself."""
    return ValueError(
        f"this {kind} is itself the module to replace, and nothing holds it; call its to_conv() or to_linear(), "
        "take its block, or wrap it in nn.Sequential"
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
