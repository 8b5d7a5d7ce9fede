"""Lists of tensors are read as one tensor is, and share the memory of what they came in."""

from __future__ import annotations

import torch

from secateur.data.tensor_list import tensor_list

WHOLE = torch.arange(60.0).reshape(10, 3, 2)


def test_a_list_is_read_as_one_tensor_is() -> None:
    blocks = [WHOLE[:4], WHOLE[4:5], WHOLE[5:]]
    for entries in (tensor_list(blocks), tensor_list(WHOLE), tensor_list(tensor_list(WHOLE))):
        assert entries.shape == WHOLE.shape
        assert (len(entries), entries.ndim) == (10, 3)
        index = torch.tensor([9, 0, 4, 4])
        assert torch.equal(entries[index], WHOLE[index])
        assert torch.equal(entries[3:7], WHOLE[3:7])
        assert torch.equal(entries[-1], WHOLE[-1])
        assert torch.equal(entries[WHOLE[:, 0, 0] > 30], WHOLE[6:])
        chosen = entries.take(torch.tensor([7, 2, 5])).take(slice(1, None))
        assert torch.equal(chosen[:], WHOLE[[2, 5]])


def test_entries_are_converted_when_it_is_read() -> None:
    entries = tensor_list(WHOLE.byte(), lambda stored: stored.float() / 2)
    for read, expected in ((entries[3], WHOLE[3]), (entries[2:4], WHOLE[2:4])):
        assert torch.equal(read, expected / 2)
    chosen = entries.take(torch.tensor([7, 2]))
    assert torch.equal(chosen[:], WHOLE[[7, 2]] / 2)
    assert chosen.blocks[0].dtype == torch.uint8


def test_a_choice_shares_memory_and_what_is_read_does_not() -> None:
    entries = tensor_list(WHOLE)
    assert entries.take(slice(2)).blocks[0].data_ptr() == WHOLE.data_ptr()
    before = WHOLE.clone()
    for read in (entries[:], entries[0], entries[torch.tensor([0])]):
        read.zero_()
    assert torch.equal(WHOLE, before)
