"""What work costs on a GPU, in seconds: the models that plans and schedules are made with.

A piece of work is described by a few numbers (`Work`), by pure functions of its shape; a `Roofline`
turns them to seconds. Its coefficients are not derived from a data sheet: `fourfold calibrate`
fits them to the kernels' times on one GPU and keeps the error that they have on times it was not
fitted to. Decode attention is priced by plan (`DecodeCost`), because how it is cut is searched.

Shapes: H query heads, G KV heads, C head width, T tokens, E experts, K experts of a token, R rows
(T * K), D model width, F expert width.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import msgspec
import torch

from fourfold.errors import ConfigError
from fourfold.kernels.decode_attention import DecodeCost
from fourfold.kernels.pages.layout import PAGE_TOKENS
from fourfold.kernels.prefill_attention.batch import SUBTILE_ROWS, SUBTILES, padded_group
from fourfold.kernels.routing.groups import choose_tile
from fourfold.kernels.w4a8_gemm.choose import choose_dense
from fourfold.kernels.w4a8_gemm.packing import BLOCK, W4A8Recipe, padded

logger = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "shipped"
"""Calibrations that come with the package, a JSON file for each GPU."""
PARTS = ("prefill_attention", "decode_attention", "prefill_ffn", "decode_ffn", "projection")
"""What is priced: the quadrants, and the dense products around attention."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """A piece of work, as far as its cost goes."""

    bytes: float
    """The fewest bytes read and written: weights, keys and values once, and the rows."""
    operations: float
    """The fewest operations, 2 per multiply-add."""
    padded: float
    """Operations as they are done, padding of tiles included."""
    exponentials: float = 0.0
    """Of attention, done as `padded` operations are."""
    tiles: float = 0.0
    """Pieces that the operations are done in: each has a beginning and an end."""
    longest: float = 0.0
    """Steps that one program takes one after the other, however idle the others: input channels of
    products, keys times channels of attention."""
    between: float = 0.0
    """Bytes that one product hands to the next, in passes that overlap with neither."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roofline:
    """Prices in seconds: `fixed`, the dearest of what overlaps (bytes; operations, exponentials and
    tiles; the longest chain of steps), and what lies between products."""

    fixed: float
    per_byte: float
    per_operation: float
    per_exponential: float
    per_tile: float
    per_step: float
    per_byte_between: float

    def seconds(self, work: Work) -> float:
        """Predicted seconds of one layer's work, launches included."""
        computing = (
            work.padded * self.per_operation
            + work.exponentials * self.per_exponential
            + work.tiles * self.per_tile
        )
        bound = max(work.bytes * self.per_byte, computing, work.longest * self.per_step)
        return self.fixed + bound + work.between * self.per_byte_between


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What the device can do, measured with the calibration."""

    bandwidth: float
    """Bytes per second that a copy reads and writes."""
    operations: float
    """Operations per second of the fastest 8-bit product of cuBLAS, of 8192 cubes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelError:
    """Relative errors |predicted / measured - 1| over points that a model was not fitted to."""

    median: float
    worst: float
    points: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuadrantCosts:
    """The models of one GPU. ValueError for a coefficient that is negative or not finite."""

    hardware: str
    """PyTorch's name of the GPU."""
    origin: str
    """How the coefficients came about: "measured", or from which GPU they were scaled."""
    memory_bandwidth: float
    """Bytes per second by the memory's clock and width: what GPUs are compared by."""
    limits: Limits
    recipe: W4A8Recipe
    """Of the weights that the products were measured with."""
    prefill_attention: Roofline
    decode_attention: DecodeCost
    prefill_ffn: Roofline
    decode_ffn: Roofline
    projection: Roofline
    errors: Mapping[str, ModelError]
    """The measured error of each of `PARTS`."""
    versions: Mapping[str, str]
    """Of the packages that ran the kernels."""

    def __post_init__(self) -> None:
        for part in (self.limits, *(getattr(self, name) for name in PARTS)):
            for field, value in dataclasses.asdict(part).items():
                if not isinstance(value, str) and not 0 <= value < math.inf:
                    raise ValueError(f"{field} is {value}")
        if missing := [part for part in PARTS if part not in self.errors]:
            raise ValueError(f"the error of {', '.join(missing)} is missing")


def prefill_attention_work(
    chunks: Sequence[tuple[int, int]], *, heads: int, kv_heads: int, head_width: int
) -> Work:
    """Chunks of prompts, each (rows, tokens of the prefix before it), over 8-bit pages."""
    pairs = sum(rows * prefix + rows * (rows + 1) / 2 for rows, prefix in chunks)
    whole_pairs = sum(rows * prefix + _whole_pairs(rows) for rows, prefix in chunks)
    tokens = sum(rows for rows, _ in chunks)
    pages = sum((prefix + rows - 1) // PAGE_TOKENS for rows, prefix in chunks)
    group = padded_group(heads, kv_heads)
    tile = SUBTILES * max(1, SUBTILE_ROWS // group)
    rows_bytes = 2 * tokens * (2 * heads + 2 * kv_heads) * head_width
    return Work(
        bytes=float(rows_bytes + _page_bytes(pages, kv_heads, head_width)),
        operations=4.0 * heads * head_width * pairs,
        padded=4.0 * kv_heads * group * head_width * whole_pairs,
        exponentials=float(kv_heads * group * whole_pairs),
        tiles=float(kv_heads * sum(-(-rows // tile) for rows, _ in chunks)),
        longest=float(max(prefix + rows for rows, prefix in chunks) * head_width),
    )


def _whole_pairs(rows: int) -> int:
    """Queries times keys of a chunk alone, where a query looks at all of its own page."""
    pages, rest = divmod(rows, PAGE_TOKENS)
    return PAGE_TOKENS * (PAGE_TOKENS * pages * (pages + 1) // 2 + rest * (pages + 1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertsShape:
    """The routed FFN of one layer."""

    width: int
    hidden: int
    experts: int
    """Those that have weights of their own."""
    chosen: int
    """Experts of a token."""
    weight_bits: float
    """Of one weight, see `weight_bits`."""


def ffn_work(tokens: int, shape: ExpertsShape) -> Work:
    """The routed FFN of so many tokens that choose experts evenly, whichever quadrant it is in."""
    rows = tokens * shape.chosen
    touched = touched_experts(tokens, shape.experts, shape.chosen)
    weights = 3.0 * shape.width * shape.hidden
    tile = choose_tile(rows, shape.experts)
    # An expert's last tile is half empty on average, and there is at least one.
    row_tiles = max(touched, rows / tile + touched / 2)
    handed = rows * (2 * shape.hidden * (2 + 1) + 2 * 2 * shape.width)
    return Work(
        bytes=touched * weights * shape.weight_bits / 8 + 3.0 * tokens * shape.width,
        operations=2.0 * rows * weights,
        padded=2.0 * row_tiles * tile * weights,
        tiles=row_tiles * (2 * shape.hidden + shape.width) / BLOCK,
        longest=float(shape.width + shape.hidden),
        between=float(handed),
    )


def touched_experts(tokens: int, experts: int, chosen: int) -> float:
    """Experts that at least one of the tokens chooses, on average when all are as likely."""
    return experts * (1.0 - (1.0 - chosen / experts) ** tokens)


def projection_work(tokens: int, *, inputs: int, outputs: int, weight_bits: float) -> Work:
    """A dense product, the quantisation of its rows included."""
    weights = float(inputs * outputs)
    # How many tokens a tile has does not depend on the GPU.
    tile = choose_dense(
        tokens, padded(inputs) // BLOCK, bits=4, outputs=outputs, hopper=True
    ).tokens
    row_tiles = -(-tokens // tile)
    return Work(
        bytes=weights * weight_bits / 8 + tokens * (inputs + 2.0 * outputs),
        operations=2.0 * tokens * weights,
        padded=2.0 * row_tiles * tile * weights,
        tiles=row_tiles * outputs / BLOCK,
        longest=float(inputs),
        between=3.0 * tokens * inputs,
    )


def weight_bits(recipe: W4A8Recipe, inputs: int) -> float:
    """Bits of one weight with its share of scales, for rows of so many input channels."""
    return recipe.bits * padded(inputs) / inputs + 32 / inputs


def _page_bytes(pages: int, kv_heads: int, head_width: int) -> int:
    """Codes and scales of sealed pages."""
    return 2 * pages * kv_heads * (PAGE_TOKENS * head_width + 4)


def costs_of(device: torch.device) -> QuadrantCosts:
    """The models of a GPU: the user's calibration of it, or else the shipped one, or else that of
    the nearest GPU by bandwidth, scaled, which is logged. ConfigError for a calibration that cannot
    be read."""
    assert device.type == "cuda", device
    index = torch.cuda.current_device() if device.index is None else device.index
    return _costs_of(index)


@functools.cache
def _costs_of(index: int) -> QuadrantCosts:
    sms = torch.cuda.get_device_properties(index).multi_processor_count
    return find_costs(torch.cuda.get_device_name(index), memory_bandwidth(index), sms)


def cost_of(device: torch.device) -> DecodeCost:
    """The decode attention model of a GPU."""
    return costs_of(device).decode_attention


def memory_bandwidth(index: int) -> float:
    """Bytes per second by clock and width of a GPU's memory, which sends twice a clock; 0 where its
    driver or PyTorch does not tell."""
    properties = torch.cuda.get_device_properties(index)
    kilohertz = getattr(properties, "memory_clock_rate", 0)
    return 2e3 * kilohertz * getattr(properties, "memory_bus_width", 0) / 8


def find_costs(hardware: str, bandwidth: float, sms: int | None = None) -> QuadrantCosts:
    """As `costs_of`, for a GPU of a name, a `memory_bandwidth` and so many processors; None: as
    many as the nearest has."""
    own = calibration_path(hardware)
    if own.exists():
        return load_costs(own)
    shipped = {costs.hardware: costs for costs in shipped_costs()}
    if hardware in shipped:
        return shipped[hardware]
    nearest = min(shipped.values(), key=lambda costs: abs(costs.memory_bandwidth - bandwidth))
    logger.warning(
        "no calibration is shipped for %s, so its work is priced from that of %s; "
        "run `fourfold calibrate` for models of its own",
        hardware,
        nearest.hardware,
    )
    return scaled(nearest, hardware, bandwidth or nearest.memory_bandwidth, sms)


def scaled(
    costs: QuadrantCosts, hardware: str, bandwidth: float, sms: int | None = None
) -> QuadrantCosts:
    """The models of a GPU that differs in memory bandwidth, and in the number of processors that
    decode attention is cut for: what is priced by the byte costs as much less as the memory is
    faster. The errors remain those of the GPU that was measured."""
    ratio = costs.memory_bandwidth / bandwidth

    def slower(model: Roofline) -> Roofline:
        return dataclasses.replace(
            model,
            per_byte=model.per_byte * ratio,
            per_byte_between=model.per_byte_between * ratio,
        )

    decode = costs.decode_attention
    return dataclasses.replace(
        costs,
        hardware=hardware,
        origin=f"scaled from {costs.hardware} by memory bandwidth, not measured",
        memory_bandwidth=bandwidth,
        limits=dataclasses.replace(costs.limits, bandwidth=costs.limits.bandwidth / ratio),
        prefill_attention=slower(costs.prefill_attention),
        decode_attention=dataclasses.replace(
            decode,
            hardware=hardware,
            sms=sms or decode.sms,
            page=decode.page * ratio,
            opened=decode.opened * ratio,
            opened_beside=decode.opened_beside * ratio,
            partial=decode.partial * ratio,
        ),
        prefill_ffn=slower(costs.prefill_ffn),
        decode_ffn=slower(costs.decode_ffn),
        projection=slower(costs.projection),
    )


def calibration_path(hardware: str) -> Path:
    """Where the user's calibration of a GPU is kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fourfold" / "costs" / f"{file_name(hardware)}.json"


def file_name(hardware: str) -> str:
    """A GPU's name as that of a file: "NVIDIA H200" is `nvidia-h200`."""
    return re.sub(r"[^a-z0-9]+", "-", hardware.lower()).strip("-")


def shipped_costs() -> Iterator[QuadrantCosts]:
    """All calibrations that come with the package."""
    return map(load_costs, sorted(SHIPPED.glob("*.json")))


def load_costs(path: Path) -> QuadrantCosts:
    """Reads a calibration. ConfigError with the remedy where it is none."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=QuadrantCosts)
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(
            f"{path} is not a calibration that this version reads ({error}); "
            "run `fourfold calibrate` again or delete the file"
        ) from error


def to_json(costs: QuadrantCosts) -> bytes:
    """What `load_costs` reads."""
    return msgspec.json.format(msgspec.json.encode(costs), indent=2) + b"\n"
