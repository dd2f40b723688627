"""Exported networks."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

EXTRA = "export"


def export_model(model: object) -> TypeError:
    """Error for something that is no module."""
    return TypeError(f"export expects an nn.Module, got {type(model).__name__}")


def export_example(example: object) -> None:
    """Raise unless `example` is a tuple of tensors that starts with images."""
    if isinstance(example, Tensor) or not isinstance(example, (tuple, list)) or not example:
        raise TypeError(f"export expects the example as a tuple (x,), got {type(example).__name__}")
    wrong = [type(value).__name__ for value in example if not isinstance(value, Tensor)]
    if wrong:
        raise TypeError(f"export expects a tuple of tensors as the example, got a {wrong[0]} in it")
    for value in example:
        if value.device.type != "cpu":
            raise ValueError(
                f"export runs on the CPU, got an example on {value.device}; move it with x.cpu()"
            )
        if value.dim() == 0 or value.shape[0] == 0:
            raise ValueError(
                f"export needs an example with at least one image, [N, C, H, W], got shape {list(value.shape)}"
            )


def export_training(name: str) -> ValueError:
    """Error for a network in training mode."""
    what = "the model is" if not name else f"{name} is"
    return ValueError(
        f"export needs a network in evaluation mode, but {what} in training mode; call model.eval()"
    )


def export_not_traceable(model: str, error: object) -> ValueError:
    """Error for a network that torch.export cannot follow."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(f"torch.export cannot follow the forward of {model} ({reason})")


def export_tied(model: str, batch: bool, size: bool, error: object) -> ValueError:
    """Error for a network whose forward uses a free axis as a plain number."""
    asked = " and ".join(name for name, on in (("dynamic_batch", batch), ("dynamic_size", size)) if on)
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{model} cannot be exported with {asked}: its forward ties that axis to the example ({reason}); "
        f"export it with {'dynamic_size=False' if size else 'dynamic_batch=False'}"
    )


def export_not_installed(names: Sequence[str], extra: str = EXTRA) -> ImportError:
    """Error for packages that an extra installs."""
    verb = "is" if len(names) == 1 else "are"
    return ImportError(
        f"{' and '.join(names)} {verb} not installed; install with: pip install 'dynaconv[{extra}]'",
        name=names[0],
    )


def export_opset(opset: object, oldest: int, newest: int) -> ValueError:
    """Error for a version of the operator set that cannot hold the graph."""
    if isinstance(opset, int) and not isinstance(opset, bool) and opset < oldest:
        return ValueError(
            f"opset {opset} is too old: the exported graph needs operators of opset {oldest}; "
            f"use opset={oldest} or newer"
        )
    return ValueError(f"opset must be a whole number from {oldest} to {newest}, got {opset!r}")


def export_no_onnx_form(model: str, error: object) -> ValueError:
    """Error for a network with an operation that has no ONNX form."""
    reason = " ".join(str(error).split())[:300]
    return ValueError(
        f"{model} has an operation without an ONNX form ({reason}); dc.export.program(model, (x,)) can export it"
    )


def export_not_sparse(block: str, reason: str) -> ValueError:
    """Error for a masked block that the sparse lowering cannot write."""
    return ValueError(
        f"block {block!r} has no sparse lowering: {reason}; use lowering='auto', which computes this block densely, "
        "or lowering='dense'"
    )


def export_mixed_thresholds(low: float, high: float) -> ValueError:
    """Error for one dial where the gates have different thresholds."""
    return ValueError(
        f"the gates of this network have thresholds from {low:g} to {high:g}, which one input cannot hold; "
        "use dial='gates' (an input for each) or dial=None (thresholds fixed)"
    )


def export_no_gates(option: str) -> ValueError:
    """Error for a report on, or a dial of, gates that a network does not have."""
    return ValueError(
        f"{option} needs a network with gates, and this one has none; leave it out, or call dc.dynamize_"
    )


def export_unknown_blocks(names: Sequence[str], known: Sequence[str]) -> ValueError:
    """Error for densities of blocks that do not exist."""
    return ValueError(
        f"densities names unknown blocks ({', '.join(names[:3])}); expected names such as {', '.join(known[:3])}"
    )


def export_not_ours(path: object, reason: str = "it has no dynaconv metadata") -> ValueError:
    """Error for an ONNX file of somebody else."""
    return ValueError(
        f"{str(path)!r} was not written by dynaconv ({reason}); make one with dc.export.onnx or `dynaconv export RUN`"
    )


def export_differs(runtime: str, error: float, tolerance: float, where: str) -> RuntimeError:
    """Error for an exported network that computes something else."""
    return RuntimeError(
        f"the exported network differs from eager PyTorch by {error:.2e} in {runtime} at {where} "
        f"(tolerance {tolerance:.0e})"
    )


def export_no_count() -> ValueError:
    """Error for executed multiply-adds where the size is free."""
    return ValueError(
        "report='executed_macs' needs a fixed size, because what masks do not change is counted for the example; "
        "use dynamic_size=False, or report='densities'"
    )


def export_engine_of_file(engine: str) -> ValueError:
    """Error for an engine that cannot read an ONNX file."""
    return ValueError(
        f"--engines {engine} does not run an ONNX file; name ort or openvino, or give bench the run itself"
    )
