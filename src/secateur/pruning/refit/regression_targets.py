"""What a layer of a cut network should output, and where the network can hold an offset."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from secateur.pruning.refit.rows import by_group

State = dict[str, Tensor]
"""Parameters and buffers by name."""


@dataclass(frozen=True, eq=False)
class RegressionTargets:
    """What a layer should output, without its bias, at some positions of some images."""

    wanted: Float[Tensor, "*row output"]
    level: Float[Tensor, "*row output"]
    """The output at which the rectifier behind the layer turns on."""
    scale: Float[Tensor, "*#row output"]
    """Scale of the norm between the layer and the rectifier, or 1."""

    def by_group(self, images: Int[Tensor, "image"], groups: int) -> RegressionTargets:
        """Return the targets of some images in float32, as `[group, row, output]`."""
        wanted, level = (by_group(v[images].float(), groups) for v in (self.wanted, self.level))
        return RegressionTargets(wanted, level, self.scale.float().reshape(groups, 1, -1))

    def rectified(self, outputs: Float[Tensor, "*row output"]) -> Float[Tensor, "*row output"]:
        """Return what the rectifier makes of the layer's outputs."""
        return (self.scale * (outputs - self.level)).relu()

    def renewed(self, outputs: Float[Tensor, "*row output"]) -> Float[Tensor, "*row output"]:
        """Return new targets for a layer with these outputs, where the rectifier hides errors.

        Where the rectifier should be off, an output that leaves it off is right already; any other
        output only needs to come down to the level (Zhang et al., TPAMI 2016, section 3.3).
        """
        should_be_off = self.scale * (self.wanted - self.level) <= 0
        is_off = self.scale * (outputs - self.level) <= 0
        return torch.where(should_be_off, torch.where(is_off, outputs, self.level), self.wanted)

    def to(self, device: torch.device) -> RegressionTargets:
        """Return the targets on a device."""
        return RegressionTargets(
            self.wanted.to(device), self.level.to(device), self.scale.to(device)
        )


@dataclass(frozen=True)
class OffsetPlace:
    """A parameter or buffer that shifts the outputs of a layer."""

    name: str
    sign: int
    """-1 if a larger value shifts the outputs down, as a running mean does."""

    def write(self, state: State, offset: Tensor) -> None:
        """Shift the outputs by an offset."""
        state[self.name] = self._shifted(state, offset)

    def rounded(self, state: State, offset: Tensor) -> Tensor:
        """Return the offset after rounding to the place's dtype."""
        old = state[self.name].double()
        return self.sign * (self._shifted(state, offset).double() - old).reshape(offset.shape)

    def _shifted(self, state: State, offset: Tensor) -> Tensor:
        old = state[self.name]
        return (old.double() + self.sign * offset.flatten()).to(old.dtype)
