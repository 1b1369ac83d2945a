"""Steps as they usually come, before any came: to compile kernels for, and to record."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import product

import torch

from fourfold.engine.config import EngineConfig
from fourfold.engine.graphs import (
    MIXED_DECODE_ROWS,
    round_room,
    round_rows,
    sampled_rows,
    usual_decode_rows,
)
from fourfold.engine.handover.pulling import PagedMemory
from fourfold.engine.mixing import mixed_sizes
from fourfold.engine.program import input_sizes, run_step
from fourfold.engine.sampler import Adjustment, Samples
from fourfold.kernels.decode_attention import DecodePlanner, DecodeShape, PlanCapacity
from fourfold.kernels.decode_attention.choose import FEW_ROWS, MANY_PARTIALS
from fourfold.kernels.decode_attention.plan import TILES
from fourfold.kernels.pages import hash_pages, move_pages
from fourfold.models.decoder import Decoder
from fourfold.quadrants.decode_attention import decode_planner, decode_shape
from fourfold.quadrants.kv_pages import PAGE_TOKENS, CodedPages, PageShape, Span, make_pages
from fourfold.quadrants.step import CodedStep, CodedWork, StepRoom

# Tokens of the sequences that decode. Longer ones of a few rows need room for more tasks, in which
# short ones take longer; and so do still longer ones of more rows.
_CONTEXT, _LONGER, _LONG = 500, 600, (1000, 1300, 2500)
_MANY = 1 << 20  # pages
# Rows of prompts at which other kernels are chosen, or the same ones tiled in another way.
_PREFILL_ROWS = (64, 128, 256, 384, 512, 1024, 2048, 3072, 4096, 5120, 8192, 16384)
# Decode rows, and rows of prompts beside them.
_MIXED_ROWS = ((256, 512), (128, 192), (1, 64))
# Decode rows beside prompts that come singly, and the longest of these, of steps that are recorded
# ahead of need.
_USUAL_BESIDE = (16, 0, 64, 128)
_USUAL_PROMPT = 2048
# Decode rows at which other kernels are chosen.
_DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


def usual_decodes(max_running: int, page_count: int) -> Iterator[list[Span]]:
    """Steps that decode, of every number of rows that has a graph of its own; shorter sequences
    first, whose graphs longer ones cannot take."""
    for rows in usual_decode_rows(max_running):
        yield _decodes(rows, page_count)
        if rows <= FEW_ROWS:
            yield _decodes(rows, page_count, _LONGER)


def usual_steps(
    config: EngineConfig, max_context: int, page_count: int
) -> Iterator[tuple[list[Span], list[Span]]]:
    """Decodes and prompts of steps that are worth a graph before they come, the most urgent
    first: where prompts queue, when a recording holds most up; long answers; prompts of any length.
    `config` has its defaults filled in."""
    sizes = mixed_sizes(config.mixed_tokens or config.tokens, PAGE_TOKENS)
    seen = set()
    for decodes, context, rows in (
        *product(MIXED_DECODE_ROWS, [_LONGER], sizes),
        *product(usual_decode_rows(config.running), _LONG, [0]),
        *product(_USUAL_BESIDE, [_LONGER], range(PAGE_TOKENS, _USUAL_PROMPT + 1, PAGE_TOKENS)),
    ):
        decodes = min(decodes, config.running)
        rows = min(rows, config.tokens - decodes)
        key = decodes, context, round_rows(rows) if rows else 0
        fits = context < max_context and decodes * -(-context // PAGE_TOKENS) <= page_count
        if key not in seen and (fits or not decodes):
            seen.add(key)
            yield _decodes(decodes, page_count, context), _prompts(rows, max_context)


def largest_work(
    config: EngineConfig, max_context: int, page_count: int, planner: DecodePlanner | None
) -> CodedWork:
    """As many rows as a step can have: of prompts, beside those of all samples."""
    prompts = _prompts(config.tokens, max_context)
    return CodedWork(_decodes(config.running, page_count), prompts, planner)


def walked_rooms(
    config: EngineConfig, max_context: int, shape: DecodeShape, planner: DecodePlanner | None
) -> Iterator[StepRoom]:
    """Rooms of steps that need, together, every kernel that a step can need. `config` has its
    defaults filled in."""
    decode_rows = {min(rows, config.running) for rows in _DECODE_ROWS}
    prefill_rows = [rows for rows in _PREFILL_ROWS if rows <= config.tokens]
    works = [
        *(CodedWork(_decodes(rows, _MANY), [], planner) for rows in sorted(decode_rows)),
        *(CodedWork([], _prompts(rows, max_context), planner) for rows in prefill_rows),
        *(
            CodedWork(
                _decodes(min(decodes, config.running), _MANY), _prompts(rows, max_context), planner
            )
            for decodes, rows in _MIXED_ROWS
        ),
        largest_work(config, max_context, _MANY, planner),
    ]
    prefill = None
    for work in works:
        room = round_room(work, -(-max_context // PAGE_TOKENS))
        assert room is not None
        yield room
        prefill = room.prefill
    if planner is None:
        return
    # Long sequences that share pages: more pieces of a row than one program merges, tiles of both
    # widths. Which batches are cut so is for the cost model to say; here they simply are.
    tiles = sorted({TILES[-1], shape.tile}, reverse=True)
    for rows, tasks, beside in (
        (min(16, config.running), 32, None),
        (config.running, max(512, 2048 // shape.kv_heads), prefill),
    ):
        for some in dict.fromkeys((tuple(tiles), tuple(tiles[-1:]))):
            plan = PlanCapacity.of_tasks(
                shape,
                rows=rows,
                tasks=tuple((tile, tasks) for tile in some),
                pages=1,
                merged=MANY_PARTIALS,
            )
            yield StepRoom(decode_rows=rows, decode=plan, prefill=beside)


def walk_steps(model: Decoder, config: EngineConfig, shape: PageShape) -> None:
    """Enqueues steps that need, together, every kernel that work needs.

    They see one page, which is not what their sizes say: only launches may be noted here, not made
    (`kernels.compiling`).
    """
    device = model.frequencies.device
    pages = make_pages(shape, 1, 1, device)
    assert isinstance(pages, CodedPages)
    heads = model.config.query_heads
    rooms = walked_rooms(
        config.on(device.type),
        model.config.max_positions,
        decode_shape(pages, heads),
        decode_planner(pages, heads),
    )
    walk_rooms(model, pages, rooms)


def walk_moves(shape: PageShape, device: torch.device) -> None:
    """Enqueues what takes pages from one worker to another; as `walk_steps`."""
    memory = PagedMemory.of(make_pages(shape, 1, 1, device))
    page = torch.zeros(1, dtype=torch.int64, device=device)
    for part in memory.parts:
        records_LPR = memory.part(part)
        hash_pages(records_LPR, page)
        move_pages(records_LPR, page, records_LPR, page)


def walk_rooms(model: Decoder, pages: CodedPages, rooms: Iterable[StepRoom]) -> None:
    """Enqueues a step of each room."""
    heads = model.config.query_heads
    samples = Samples(1, model.config.vocabulary, pages.device)
    # Sampling asks for the same kernels in every room.
    adjustments = [Adjustment.NONE, Adjustment.PENALTIES]
    for room in rooms:
        step = CodedStep(pages, room, heads, beside=input_sizes(room.rows, sampled_rows(room)))
        with torch.inference_mode():
            for adjustment in adjustments:
                run_step(model, step, step.arrays, samples, adjustment=adjustment)
        adjustments = [Adjustment.NONE]


def _decodes(rows: int, page_count: int, context: int = _CONTEXT) -> list[Span]:
    each = -(-context // PAGE_TOKENS)
    return [
        Span(context, 1, [(row * each + page) % page_count for page in range(each)], row)
        for row in range(rows)
    ]


def _prompts(rows: int, max_context: int) -> list[Span]:
    """Of so many rows together, each as long as a sequence can be."""
    whole, rest = divmod(rows, max_context)
    return [
        Span(0, length, [0] * -(-length // PAGE_TOKENS))
        for length in (*[max_context] * whole, rest)
        if length
    ]
