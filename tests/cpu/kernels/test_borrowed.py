"""Memory that is somebody else's as a tensor, kept as long as anything looks at it."""

from __future__ import annotations

import ctypes
import gc
import weakref

import torch

from fourfold.kernels.borrowed import borrow


class Owner:
    """Of some memory."""

    def __init__(self, content: bytes) -> None:
        self.buffer = (ctypes.c_uint8 * len(content))(*content)


def test_the_owner_lives_as_long_as_any_view() -> None:
    owner = Owner(b"pages of a neighbour")
    gone = weakref.ref(owner)
    address = ctypes.addressof(owner.buffer)
    tensor = borrow(address, 20, torch.device("cpu"), owner)
    assert tensor.dtype is torch.uint8
    assert tensor.data_ptr() == address
    assert bytes(tensor.tolist()) == b"pages of a neighbour"
    owner.buffer[0] = ord("P")
    view = tensor.view(2, 10)[0]
    del owner, tensor
    gc.collect()
    assert gone() is not None
    assert bytes(view.tolist()) == b"Pages of a"
    del view
    gc.collect()
    assert gone() is None


def test_several_tensors_of_one_owner() -> None:
    owner = Owner(bytes(range(64)))
    gone = weakref.ref(owner)
    address = ctypes.addressof(owner.buffer)
    parts = [borrow(address + 16 * n, 16, torch.device("cpu"), owner) for n in range(4)]
    del owner
    for part in range(3, 0, -1):
        del parts[part]
        gc.collect()
        assert gone() is not None
    assert parts[0].sum() == sum(range(16))
    parts.clear()
    gc.collect()
    assert gone() is None
