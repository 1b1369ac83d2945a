"""Where the memory of a loaded model is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn

from fourfold.models.decoder import Decoder
from fourfold.models.footprint import DENSE_FFN, EXPERTS
from fourfold.models.layers import RMSNorm, SparseFFN


def weight_bytes(model: Decoder) -> dict[str, int]:
    """Bytes of the tensors that a loaded model holds, by part as `footprint` calls them. Storage
    that is shared is counted once, where it is met first."""
    seen: set[object] = set()
    held: dict[str, int] = {}
    for path, module in model.named_modules():
        part = _part_of(path, module, model)
        for tensor in _tensors_of(module):
            place, size = _storage_of(tensor)
            if place not in seen:
                seen.add(place)
                held[part] = held.get(part, 0) + size
    return held


def told(weights: Mapping[str, int]) -> str:
    """`weight_bytes` for a log, largest first: `16.0 GiB (experts and routers 15.0, head 0.3)`.
    Of a small model in MiB; parts that would be told as 0.0 are left out."""
    whole = sum(weights.values())
    size, unit = (2**30, "GiB") if whole >= 2**29 else (2**20, "MiB")
    parts = sorted(weights.items(), key=lambda part: -part[1])
    listed = [f"{part} {held / size:.1f}" for part, held in parts if held >= size / 20]
    return f"{whole / size:.1f} {unit}" + (f" ({', '.join(listed)})" if listed else "")


def _part_of(path: str, module: nn.Module, model: Decoder) -> str:
    if isinstance(module, RMSNorm):
        return "norms"
    names = path.split(".")
    if names[0] != "layers" or len(names) < 3:
        return names[0]
    if names[2] == "attention":
        return "attention"
    return EXPERTS if isinstance(model.blocks[int(names[1])].ffn, SparseFFN) else DENSE_FFN


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """A module's own tensors, registered or not: weights keep their codes as plain attributes."""
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)
    yield from _tensors_in(list(vars(module).values()))


def _tensors_in(values: Iterable[object]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors_in(value)


def _storage_of(tensor: Tensor) -> tuple[object, int]:
    """What tells a tensor's storage from others, and its bytes."""
    if tensor.is_mkldnn:  # packed for a CPU, which shows nobody where
        return ("packed", id(tensor)), tensor.nbytes
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
