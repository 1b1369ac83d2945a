"""What the device can do, as cases like any other: a copy, and cuBLAS on products of 8192 cubes.

Data are random: tensor cores draw more power, and so run slower, on them than on zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from fourfold.bench.kernels.case import Case, Ceiling

_SIDE = 8192
_COPIED_BYTES = 2**30


def ceilings(device: torch.device) -> Iterator[Case]:
    """One case for each ceiling that the device has."""
    source = torch.randint(2**31, (_COPIED_BYTES // 4,), dtype=torch.int32, device=device)
    # Not `copy_`: in a graph a large one becomes a copy engine's work, which is a fifth slower.
    copy = partial(torch.bitwise_not, source, out=torch.empty_like(source))
    yield Case(
        kernel="copy bandwidth",
        case="1 GiB",
        run=copy,
        work=2.0 * _COPIED_BYTES,
        unit="B",
        ceiling="copy bandwidth",
    )
    del source, copy
    a, b = (torch.randn(_SIDE, _SIDE, dtype=torch.bfloat16, device=device) for _ in range(2))
    yield _product("cuBLAS BF16", partial(torch.mm, a, b.t()))
    a8, b8 = (_codes(x) for x in (a, b))
    yield _product("cuBLAS INT8", partial(torch._int_mm, a8, b8.t()))
    if torch.cuda.get_device_capability(device) < (8, 9):
        return
    one = torch.ones((), device=device)
    a8, b8 = (x.to(torch.float8_e4m3fn) for x in (a, b))
    yield _product(
        "cuBLAS FP8",
        partial(
            torch._scaled_mm,
            a8,
            b8.t(),
            scale_a=one,
            scale_b=one,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ),
    )


def _product(name: Ceiling, run: partial[Tensor]) -> Case:
    cubed = " x ".join([str(_SIDE)] * 3)
    return Case(kernel=name, case=cubed, run=run, work=2.0 * _SIDE**3, unit="FLOP", ceiling=name)


def _codes(x: Tensor) -> Tensor:
    return (x * (127 / 4)).round().clamp(-127, 127).to(torch.int8)
