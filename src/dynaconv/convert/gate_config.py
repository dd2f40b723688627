"""What every config shares that gives a residual block a gate."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, ClassVar

from torch import nn

from dynaconv.nn.gate import Gate
from dynaconv.nn.masked_block import Anatomy, MaskedBlock


class GateConfig:
    """Base of the configs that give a block a gate; a subclass is a frozen dataclass, registered in `CONFIGS`."""

    kind: ClassVar[str]
    dilation_gradient: str | None

    def build_gate(self, in_channels: int, stride: int) -> Gate:
        """A gate for a block with this many input channels and this stride."""
        raise TypeError(f"{type(self).__name__} must implement build_gate(in_channels, stride)")

    def obstacle(self, model: nn.Module, name: str, block: nn.Module, anatomy: Anatomy) -> str | None:
        """Why the block `name` of `model`, which can be masked, cannot have this gate, or None."""
        return None

    def wrap(self, block: nn.Module, anatomy: Anatomy, name: str) -> MaskedBlock:
        """The block with its gate, in the block's mode, on its device and in its dtype."""
        masked = MaskedBlock(
            block, anatomy, nn.Identity(), config=self, dilation_gradient=self.dilation_gradient or "none"
        )
        return self.with_gate(masked)

    def with_gate(self, masked: MaskedBlock) -> MaskedBlock:
        """Build the gate that fits the block and put it in."""
        reference = next(masked.block.parameters())
        gate = self.build_gate(masked.in_channels, masked.stride)
        masked.gate = gate.to(reference.device, reference.dtype).train(masked.training)
        return masked

    def finish_(self, model: nn.Module, names: list[str]) -> None:
        """What else the model needs once the blocks `names` have their gates."""

    def describe(self) -> str:
        """A few words for the conversion report."""
        return self.kind

    def to_dict(self) -> dict[str, Any]:
        """JSON form; `config_from_dict` reads it back."""
        return {"kind": self.kind, **asdict(self)}
