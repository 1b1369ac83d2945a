"""Launching the kernels of products: which one, with how many programs, compiled for what.

Shapes: as in `gemm`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.dependent_launch import overlaps_launches
from fourfold.kernels.routing.groups import RowGroups
from fourfold.kernels.w4a8_gemm.choose import (
    FEW_TOKENS,
    MOST_SPLIT_TOKENS,
    Kernel,
    Tiles,
    hopper_stages,
)
from fourfold.kernels.w4a8_gemm.packing import BLOCK


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
    """A product on checked arguments; `groups`, `gather`, `scatter` and `swiglu` as of
    `grouped_w4a8_gemm`."""

    x: Tensor
    x_scale: Tensor
    weight: Tensor
    w_scale_EO: Tensor
    group: Tensor | None = None
    y: Tensor
    codes: str
    """"int8" or "fp8"."""
    unit: float
    """What one step of the codes of weights stands for, before the scale."""
    span: int
    """Input channels that share a group's parameters; 0 where there are none."""
    groups: RowGroups | None = None
    gather: int | None = None
    scatter: bool = False
    swiglu: bool = False

    @property
    def bits(self) -> int:
        """Of a weight."""
        return 4 if self.weight.dtype == torch.uint8 else 8

    @property
    def blocks(self) -> int:
        """Of input channels."""
        return self.x.shape[1] // BLOCK

    def rows_of_tiles(self, tiles: Tiles) -> int:
        """How many tiles all rows are."""
        if self.groups is not None:
            return self.groups.tiles_3N.shape[1]
        return -(-self.y.shape[0] // tiles.tokens)

    def columns_of_tiles(self, tiles: Tiles) -> int:
        """How many tiles all outputs are."""
        return -(-self.y.shape[1] // (tiles.half if self.swiglu else 2 * tiles.half))


def launch(product: Product, tiles: Tiles) -> None:
    """Enqueues a product."""
    p = product
    assert p.x.is_contiguous(), p.x.shape
    dtypes = p.x_scale.dtype, p.w_scale_EO.dtype
    assert dtypes == (torch.float32, torch.float32), dtypes
    assert p.groups is None or p.groups.tile == tiles.tokens, (p.groups, tiles)
    assert p.blocks % tiles.split == 0, (p.blocks, tiles)
    launches = {
        Kernel.TRITON: _launch_triton,
        Kernel.RING: _launch_ring,
        Kernel.DENSE: _launch_dense,
        Kernel.FEW: _launch_few,
    }
    launches[tiles.kernel](p, tiles)


def _launch_triton(p: Product, tiles: Tiles) -> None:
    from fourfold.kernels.w4a8_gemm import triton_gemm

    early = overlaps_launches(p.x.device)
    triton_gemm._gemm[(_programs(p, tiles),)](
        *_arguments(p, tiles),
        **_constants(p, tiles),
        CODES=p.codes,
        STAGES=tiles.stages,
        HALF=tiles.half,
        SPLIT=tiles.split,
        ASM=p.x.is_cuda,
        EARLY=early,
        num_warps=tiles.warps,
        launch_pdl=early,
    )


def _launch_ring(p: Product, tiles: Tiles) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fourfold.kernels.w4a8_gemm import gluon_gemm

    assert tiles.split == 1 or tiles.tokens <= MOST_SPLIT_TOKENS, tiles
    if p.group is not None:
        # Parameters are copied by words of 32 bits.
        of_word = 4 // p.group.element_size()
        assert p.w_scale_EO.shape[1] % of_word == p.y.shape[1] % of_word == 0, (p.y.shape, of_word)
    x, x_scale, weight, *others = _arguments(p, tiles)
    shared = gl.NVMMASharedLayout(64, 8, 2)
    rows = weight.view(-1, weight.shape[-1])
    copies = TensorDescriptor.from_tensor(rows, list(gluon_gemm.BOX), shared)
    # Where programs split, two share a processor.
    limit = {"maxnreg": 80} if tiles.split > 1 else {}
    gluon_gemm._gemm[(_programs(p, tiles),)](
        x,
        x_scale,
        copies,
        *others,
        **_constants(p, tiles),
        INT8=p.codes == "int8",
        STAGES=hopper_stages(tiles, p.y.element_size(), p.bits),
        UNROLL=math.gcd(tiles.unroll, p.blocks // tiles.split),
        SPLIT=tiles.split > 1,
        EARLY=True,
        num_warps=tiles.warps,
        launch_pdl=True,
        **limit,
    )


def _launch_dense(p: Product, tiles: Tiles) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from fourfold.kernels.w4a8_gemm import gluon_dense

    assert p.bits == 8, p.weight.dtype
    assert p.groups is None
    outputs = 2 * tiles.half
    # Results leave through the ring of weights.
    assert tiles.stages * BLOCK >= tiles.tokens * p.y.element_size(), tiles
    many = p.rows_of_tiles(tiles)
    shared = gl.NVMMASharedLayout(128, 8, 2)
    gluon_dense._gemm[(many * p.columns_of_tiles(tiles),)](
        TensorDescriptor.from_tensor(p.x, [tiles.tokens, BLOCK], shared),
        TensorDescriptor.from_tensor(p.weight, [outputs, BLOCK], shared),
        p.x_scale,
        p.w_scale_EO,
        p.y,
        *p.y.shape,
        p.x.shape[1],
        many,
        STAGES=tiles.stages,
        num_warps=tiles.warps,
        # Fewer registers than there are, so that a program starts beside the kernel in front.
        maxnreg=128 if outputs <= 128 else None,
        launch_pdl=True,
    )


def _launch_few(p: Product, tiles: Tiles) -> None:
    from fourfold.kernels.w4a8_gemm import gluon_few

    assert (p.bits == 4) == (p.groups is not None) == p.scatter, (p.weight.dtype, p.groups)
    assert p.gather is None, p.gather
    assert not p.swiglu
    assert tiles.tokens <= FEW_TOKENS, tiles
    *arguments, _ = _arguments(p, tiles)  # there is one width
    gluon_few._gemm[p.columns_of_tiles(tiles), p.rows_of_tiles(tiles)](
        *arguments,
        UNIT=p.unit,
        INT8=p.codes == "int8",
        SPAN=p.span,
        ROWS=2 * tiles.half,
        TILE=tiles.tokens,
        SPLIT=tiles.split,
        num_warps=tiles.warps,
        launch_pdl=True,
    )


def _arguments(p: Product, tiles: Tiles) -> tuple[Any, ...]:
    """What the kernels that may be grouped are handed. What there is not is any tensor."""
    groups, nothing = p.groups, p.weight
    return (
        p.x,
        p.x_scale,
        p.weight,
        p.w_scale_EO,
        nothing if p.group is None else p.group,
        nothing if groups is None else groups.order_R,
        nothing if groups is None else groups.tiles_3N,
        p.y,
        p.y.shape[0],
        p.w_scale_EO.shape[1],
        p.x.shape[1],
        p.rows_of_tiles(tiles),
        p.y.shape[1],
    )


def _constants(p: Product, tiles: Tiles) -> dict[str, Any]:
    """What the kernels that take tile after tile are compiled for."""
    return {
        "UNIT": p.unit,
        "SPAN": p.span,
        "BITS": p.bits,
        "GROUPED": p.groups is not None,
        "CHOICES": p.gather or 0,
        "SCATTER": p.scatter,
        "SWIGLU": p.swiglu,
        "TILE": tiles.tokens,
    }


def _programs(p: Product, tiles: Tiles) -> int:
    """Programs that take tile after tile."""
    all_tiles = p.rows_of_tiles(tiles) * p.columns_of_tiles(tiles)
    return min(all_tiles, tiles.programs * processors(p.x.device))


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
