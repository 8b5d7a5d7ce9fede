"""Tensors of one shape as a list: a choice of them is an index, and only reading copies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TensorList:
    """Entries of one shape and dtype, held in the tensors that they came in.

    It is indexed as a tensor is along its first axis, and what that returns is always a copy.
    """

    blocks: tuple[Tensor, ...]
    """Tensors `[entry, …]`, one after the other; not copied."""
    index: Int[Tensor, "entry"]
    """Number of each entry among those of all blocks."""
    convert: Callable[[Tensor], Tensor] | None = None
    """Makes what is read, `[entry, …]`, of what is held: floats of bytes, of the same shape."""

    @property
    def shape(self) -> torch.Size:
        """The shape that one tensor with all entries would have."""
        return torch.Size((len(self.index), *self.blocks[0].shape[1:]))

    @property
    def ndim(self) -> int:
        """Axes, that of the entries included."""
        return self.blocks[0].ndim

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, wanted: Tensor | slice | int) -> Tensor:
        numbers = self.index[wanted]
        entries = self._taken(numbers[None] if numbers.ndim == 0 else numbers)
        if self.convert is not None:
            entries = self.convert(entries)
        return entries[0] if numbers.ndim == 0 else entries

    def _taken(self, numbers: Int[Tensor, "wanted"]) -> Tensor:
        if len(self.blocks) == 1:
            return self.blocks[0].index_select(0, numbers.to(self.blocks[0].device))
        return self._joined(numbers)

    def _joined(self, numbers: Int[Tensor, "wanted"]) -> Tensor:
        ends = torch.tensor([0, *(len(block) for block in self.blocks)]).cumsum(0)
        block_of = torch.searchsorted(ends, numbers, right=True) - 1
        rows = numbers - ends[block_of]
        result = self.blocks[0].new_empty((len(numbers), *self.shape[1:]))
        # One by one: what indices choose of a block would be a copy beside the result.
        for entry, block, row in zip(result, block_of.tolist(), rows.tolist(), strict=True):
            entry.copy_(self.blocks[block][row])
        return result

    def take(self, wanted: Tensor | slice) -> TensorList:
        """Return a list of some entries, by their places in this one or a mask of them."""
        return replace(self, index=self.index[wanted])


def tensor_list(
    entries: Tensor | TensorList | Sequence[Tensor],
    convert: Callable[[Tensor], Tensor] | None = None,
) -> TensorList:
    """Return tensors `[entry, …]` as one list of their entries; for `convert` see `TensorList`."""
    if isinstance(entries, TensorList):
        return entries
    blocks = (entries,) if isinstance(entries, Tensor) else tuple(entries)
    return TensorList(blocks, torch.arange(sum(map(len, blocks))), convert)
