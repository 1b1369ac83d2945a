"""Tensors over memory that is not PyTorch's, on the device that is to compute with it.

PyTorch asks the driver where memory lies, and copies what lies on another GPU; but a GPU can read a
neighbour's memory where it is mapped. So the storage is made by what PyTorch's own graphs of steps
use for theirs, which believes what it is told.
"""

from __future__ import annotations

import torch
from torch import Tensor


def borrow(address: int, size: int, device: torch.device, owner: object) -> Tensor:
    """The memory at an address as uint8 [size] for a device, which can reach it. `owner` is kept as
    long as the tensor or a view of it."""
    storage = torch._C._construct_storage_from_data_pointer(address, device, size)
    # Python's side of a storage lives as long as the storage.
    storage.owner = owner  # type: ignore[attr-defined]
    tensor = torch.empty(0, dtype=torch.uint8, device=device)
    return tensor.set_(storage, 0, (size,), (1,))
