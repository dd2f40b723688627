"""The engine: compiling, calling and loading compiled networks."""

from __future__ import annotations

from collections.abc import Sequence


def engine_mutates(names: Sequence[str]) -> ValueError:
    """Error for a forward that changes the network."""
    return ValueError(
        f"this network changes {', '.join(map(repr, names[:3]))} in its forward, which a compiled one would not repeat; "
        "call model.eval() first, or take that out of forward"
    )


def engine_not_exportable(model: str, error: object) -> ValueError:
    """Error for a network that torch.export cannot follow."""
    return ValueError(f"torch.export cannot follow the forward of {model}, so it cannot be compiled: {error}")
