"""The engine: compiling, calling and loading compiled networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def engine_mutates(names: Sequence[str]) -> ValueError:
    """Error for a forward that changes the network."""
    return ValueError(
        f"this network changes {', '.join(map(repr, names[:3]))} in its forward, which compiled code would not repeat; "
        "call model.eval() first, or take that out of forward"
    )


def engine_not_exportable(model: str, error: object) -> ValueError:
    """Error for a network that torch.export cannot follow."""
    return ValueError(f"torch.export cannot follow the forward of {model}, so it cannot be compiled: {error}")


def engine_inputs(inputs: Sequence[object], plan: Any) -> None:
    """Raise unless a compiled model can take these inputs."""
    channels, height, width = plan.image
    want = f"[{'N' if plan.batch is None else plan.batch}, {channels}, {height}, {width}]"
    if len(inputs) != plan.inputs:
        raise TypeError(f"this compiled model takes {plan.inputs} inputs, got {len(inputs)}")
    x = inputs[0]
    if not isinstance(x, Tensor):
        raise TypeError(f"a compiled model expects a tensor {want}, got {type(x).__name__}")
    if plan.image == (0, 0, 0):
        return
    if x.device.type != "cpu":
        raise ValueError(f"a compiled model runs on the CPU, got x on {x.device}; move it with x.cpu()")
    if x.layout != torch.strided:
        raise ValueError(
            f"a compiled model expects a strided tensor, got layout {x.layout}; call x.to_dense()"
        )
    if x.dtype != torch.float32:
        raise TypeError(
            f"a compiled model expects x in torch.float32, got {x.dtype}; convert it with x.float()"
        )
    if x.dim() != 4 or tuple(x.shape[1:]) != (channels, height, width):
        raise ValueError(
            f"this model was compiled for x {want}, got {list(x.shape)}; compile it again with an example of that size"
        )
    if plan.batch is not None and x.shape[0] != plan.batch:
        raise ValueError(
            f"torch.export tied this network to batches of {plan.batch} images, got {x.shape[0]}; "
            "its forward uses the batch size as a plain number"
        )


def engine_example(inputs: object) -> None:
    """Raise unless `example_inputs` is a tuple that starts with images."""
    if isinstance(inputs, Tensor) or not isinstance(inputs, (tuple, list)) or not inputs:
        raise TypeError(f"compile expects example_inputs as a tuple (x,), got {type(inputs).__name__}")
    x = inputs[0]
    if not isinstance(x, Tensor):
        raise TypeError(
            f"compile expects a tensor [N, C, H, W] as the first example input, got {type(x).__name__}"
        )
    if x.dim() and x.shape[0] == 0:
        raise ValueError(f"compile needs an example with at least one image, got shape {list(x.shape)}")


def engine_training(names: Sequence[str]) -> ValueError:
    """Error for a network in training mode."""
    what = "the model is" if not names[0] else f"{names[0]} is"
    return ValueError(
        f"compile needs a network in evaluation mode, but {what} in training mode; call model.eval()"
    )


def engine_dtype(dtype: object, reason: str) -> ValueError:
    """Error for a precision without kernels."""
    return ValueError(f"compile cannot use dtype={dtype}: {reason}; use dtype=None for float32")


def engine_model(model: object) -> TypeError:
    """Error for something that is no module."""
    return TypeError(f"compile expects an nn.Module, got {type(model).__name__}")


def engine_device(device: object) -> ValueError:
    """Error for a network on another device."""
    return ValueError(f"the engine runs on the CPU, but the model is on {device}; move it with model.cpu()")


def engine_batch(images: int, most: int) -> ValueError:
    """Error for more images than the kernels can number."""
    return ValueError(
        f"a compiled model takes at most {most} images of this size, got {images}; split the batch"
    )


def engine_nan_logits(layer: str) -> ValueError:
    """Error for a mask that would be decided from no numbers."""
    return ValueError(
        f"the logits of {layer!r} are NaN, so there is nothing to decide its mask by: the images or the network's "
        "weights hold NaN or infinities, or values became too large on the way; look at x.isfinite() and the weights"
    )


def engine_other_file(path: str, got: object, expected: int) -> ValueError:
    """Error for a file that is no compiled model of this version."""
    what = "is no compiled model" if got is None else f"is of format {got}"
    return ValueError(
        f"{path} {what}, expected a compiled model of format {expected}; compile and save it again"
    )


def engine_damaged_file(path: str, error: object) -> ValueError:
    """Error for a file that cannot be read to its end."""
    return ValueError(f"{path} is damaged or cut short ({error}); compile and save it again")


def engine_not_storable(name: str, value: object) -> TypeError:
    """Error for a plan that holds something which no file can."""
    return TypeError(
        f"this compiled model cannot be saved: it runs {name!r}, a {type(value).__name__}, which a file cannot hold; "
        "save the network and compile it again"
    )


def engine_weights(what: str, expected: str, got: object) -> ValueError:
    """Error for a plan whose weights are not those that its kernels would read."""
    return ValueError(
        f"{what} must be {expected}, got {got}; the file was changed: compile and save it again"
    )


def engine_result(target: str, size: Sequence[int], dtype: str, got: Tensor) -> ValueError:
    """Error for an operation whose result is not what the compiled steps after it were made for."""
    return ValueError(
        f"{target} gave rows {list(got.shape)} of {got.dtype}, but this model was compiled for "
        f"[N, {', '.join(map(str, size))}] of torch.{dtype}; compile it again"
    )


def engine_unknown_operator(path: str, name: str) -> ValueError:
    """Error for a file that calls what this PyTorch does not have, or what no file may name."""
    return ValueError(
        f"{path} calls {name}, which is no operator that a compiled model may use; compile it again"
    )


def engine_not_verified(report: Mapping[str, Any]) -> RuntimeError:
    """Error for a compiled model that computes something else."""
    return RuntimeError(
        f"the compiled model differs from the {report['reference']} result by {report['error']:.2e} (tolerance "
        f"{report['tolerance']:.0e}); the worst step is {report['worst_kernel']} of {report['worst_layer'] or 'none'}, "
        f"off by {report['worst_error']:.2e}"
    )


def engine_fixed_gates(names: Sequence[str]) -> ValueError:
    """Error for a dial that was compiled in."""
    return ValueError(
        f"the thresholds of {len(names)} gates ({', '.join(names[:3])}) were compiled in; "
        "call dc.set_budget_(model, target) before dc.compile"
    )


def engine_unforced_gates(names: Sequence[str]) -> ValueError:
    """Error for forced decisions that a plan cannot follow."""
    return ValueError(
        f"decisions are forced on {len(names)} gates ({', '.join(names[:3])}) that a compiled model runs as ordinary "
        "operations, so it cannot follow them; force masks in eager mode, or compile spatial masks or layer gates"
    )
