"""Pages that move between memories, and the hash that shows what was read."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fourfold.kernels.pages import hash_pages, move_pages
from fourfold.kernels.pages.triton_move import launch_move

LAYERS, FROM_PAGES, TO_PAGES = 3, 7, 5


def memory(pages: int, size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (LAYERS, pages, size)
    return torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def wrapped(value: int) -> int:
    """As a signed 32-bit number."""
    return (value + 2**31) % 2**32 - 2**31


@pytest.mark.parametrize("size", [128, 384, 16384 + 128, 65536 + 128])
@pytest.mark.parametrize("pages", [[], [6], [5, 0, 2]])
def test_pages_move_and_nothing_else_does(size: int, pages: list[int]) -> None:
    source, before = memory(FROM_PAGES, size, 0), memory(TO_PAGES, size, 1)
    from_J, to_J = torch.tensor(pages).long(), torch.tensor([4, 1, 0][: len(pages)]).long()
    wanted = before.clone()
    wanted[:, to_J] = source[:, from_J]
    for move in (move_pages, launch_move):
        target = before.clone()
        hashes = move(target, to_J, source, from_J)
        assert torch.equal(target, wanted)
        assert hashes.shape == (LAYERS, len(pages), 2)
        assert torch.equal(hashes, hash_pages(source, from_J))
        assert torch.equal(launch_move(None, None, source, from_J), hashes)


def test_the_hash_is_two_sums_of_words() -> None:
    source = memory(1, 128, 3)
    words = source[1, 0].view(torch.int32).tolist()
    plain, weighed = hash_pages(source, torch.tensor([0]))[1, 0].tolist()
    assert plain == wrapped(sum(words))
    assert weighed == wrapped(sum(word * (2 * place + 1) for place, word in enumerate(words)))


def test_what_changed_shows() -> None:
    pages = torch.tensor([0])
    source = memory(1, 256, 4)
    right = hash_pages(source, pages)
    for byte in (0, 100, 255):
        for bit in range(8):
            source[0, 0, byte] ^= 1 << bit
            assert not torch.equal(hash_pages(source, pages)[0], right[0])
            source[0, 0, byte] ^= 1 << bit
    swapped = source.clone()
    words = swapped[0, 0].view(torch.int32)
    words[3], words[40] = words[40].item(), words[3].item()
    assert not torch.equal(hash_pages(swapped, pages)[0], right[0])
