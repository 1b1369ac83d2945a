"""The points of a calibration: work in all sizes of each quadrant, built when its turn comes.

Inputs are random and nothing is checked here, that is the kernel bench's affair. The shapes are
those of models in use, so that coefficients hold for more than one: Qwen3-30B-A3B, one with fewer
wider experts, one with narrower.

Shapes: T tokens, H query heads, G KV heads, C head width, E experts, K choices, D model width, F
expert width, O outputs, B blocks of input channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from fourfold.bench.calibrate.decode_steps import RandomStep, calibration_points
from fourfold.kernels.decode_attention import DecodePlan, candidate_plans
from fourfold.kernels.pages.layout import PAGE_TOKENS, PageLayout
from fourfold.kernels.prefill_attention import describe_prefill, paged_int8_attention_prefill
from fourfold.kernels.rows.quantize import TURN
from fourfold.kernels.w4a8_gemm.packing import BLOCK, HALF, PackedW4A8, W4A8Recipe, padded
from fourfold.quadrants.costs import (
    ExpertsShape,
    Work,
    cost_of,
    ffn_work,
    prefill_attention_work,
    projection_work,
    weight_bits,
)
from fourfold.quadrants.experts import ExpertWeights, Routing
from fourfold.quadrants.prefill_ffn import prefill_ffn
from fourfold.quantize.weights import Activations, CudaW4A8Weight

RECIPE = W4A8Recipe.INT8_G128
"""Of all points; served by default are groups of 64, whose kernel is 4 % slower, and attention's
projections in 8 bits (docs/experiments.md)."""
_PLANS = 12
"""Plans timed of each step of decode attention: enough to bring out what cutting costs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A piece of work and a call that does it."""

    name: str
    work: Work
    run: Callable[[], object]


def prefill_attention_points(device: torch.device) -> Iterator[Point]:
    """Chunks short and long, alone and many, with and without a prefix."""
    steps = [
        *(((rows, 0),) for rows in (64, 256, 512, 1024, 2048, 4096, 8192, 16384)),
        *(((64, 32768),), ((256, 16384),), ((512, 8192),), ((1024, 4096),), ((2048, 30720),)),
        tuple((300 + 513 * i, 1024 * i) for i in range(8)),
        ((512, 0),) * 16,
        ((128, 1024),) * 32,
        ((2048, 2048),) * 4,
    ]
    for heads, kv_heads, width, chosen in (
        (32, 4, 128, steps),
        (32, 8, 128, [((1024, 0),), ((4096, 4096),), ((256, 8192),) * 4]),
        (32, 4, 64, [((512, 0),), ((8192, 0),), ((1024, 8192),)]),
    ):
        for chunks in chosen:
            yield _attention(chunks, heads, kv_heads, width, device)


def _attention(
    chunks: Sequence[tuple[int, int]], heads: int, kv_heads: int, width: int, device: torch.device
) -> Point:
    layout = PageLayout(kv_heads=kv_heads, head_width=width)
    tokens = sum(rows for rows, _ in chunks)
    described, pages, first = [], 0, 0
    for rows, prefix in chunks:
        used = (prefix + rows) // PAGE_TOKENS
        described.append((first, rows, prefix, range(pages, pages + used)))
        pages, first = pages + used, first + rows
    size = pages + 1, layout.record_bytes
    records = torch.randint(0, 256, size, dtype=torch.uint8, device=device)
    scales = layout.views(records).scales
    scales.copy_(torch.rand(scales.shape, device=device) * 0.02 + 0.005)
    q_THC = torch.randn(tokens, heads, width, dtype=torch.bfloat16, device=device)
    k_TGC, v_TGC = torch.randn(
        2, tokens, kv_heads, width, dtype=torch.bfloat16, device=device
    ).unbind()
    batch = describe_prefill(described, heads=heads, kv_heads=kv_heads, device=device)
    several = f"{len(chunks)} x " if len(chunks) > 1 else ""
    return Point(
        name=f"{several}{chunks[-1][0]} over {chunks[-1][1]}, {heads}/{kv_heads} x {width}",
        work=prefill_attention_work(chunks, heads=heads, kv_heads=kv_heads, head_width=width),
        run=partial(paged_int8_attention_prefill, q_THC, k_TGC, v_TGC, records, layout, batch),
    )


def _experts(width: int, hidden: int, experts: int, chosen: int) -> ExpertsShape:
    return ExpertsShape(
        width=width,
        hidden=hidden,
        experts=experts,
        chosen=chosen,
        weight_bits=weight_bits(RECIPE, width),
    )


_EXPERTS = (
    # shape, tokens of decode, tokens of prefill
    (
        _experts(2048, 768, 128, 8),
        (1, 2, 4, 8, 16, 32, 64, 128, 256),
        (256, 512, 1024, 2048, 4096, 16384),
    ),
    (_experts(4096, 2048, 16, 2), (1, 4, 16, 64, 128, 256), (384, 1024, 4096, 8192)),
    (_experts(2048, 1408, 64, 6), (1, 8, 64, 256), (512, 2048, 8192)),
)


def decode_attention_steps(device: torch.device) -> Iterator[tuple[RandomStep, list[DecodePlan]]]:
    """Steps, each with some of its plans, from the finest cut to the coarsest."""
    cost = cost_of(device)
    for step in calibration_points():
        random = RandomStep(step, device)
        plans = list(candidate_plans(random.sequences, step.shape, cost))
        yield random, plans[:: -(-len(plans) // _PLANS)]


def decode_ffn_points(device: torch.device) -> Iterator[Point]:
    """A token to a few hundred."""
    for shape, few, _ in _EXPERTS:
        yield from _ffn(few, shape, device)


def prefill_ffn_points(device: torch.device) -> Iterator[Point]:
    """A short chunk to many thousand tokens."""
    for shape, _, many in _EXPERTS:
        yield from _ffn(many, shape, device)


def _ffn(sizes: Sequence[int], shape: ExpertsShape, device: torch.device) -> Iterator[Point]:
    turn = torch.linalg.qr(torch.randn(TURN, TURN)).Q.contiguous().to(device)
    width, hidden, experts = shape.width, shape.hidden, shape.experts
    weights = ExpertWeights(
        CudaW4A8Weight(_random_weight(experts, 2 * hidden, width, device), None),
        CudaW4A8Weight(_random_weight(experts, width, hidden, device), turn),
        slots=experts,
    )
    for tokens in sizes:
        x = Activations(None, _random_rows(tokens, width, device), torch.bfloat16)
        even_TE = torch.rand(tokens, experts, device=device)
        routing = Routing(*even_TE.topk(shape.chosen, sorted=False))
        yield Point(
            name=f"{tokens} x {shape.chosen} of {experts}, {width} x {hidden}",
            work=ffn_work(tokens, shape),
            run=partial(prefill_ffn, x, routing, weights),
        )


def projection_points(device: torch.device) -> Iterator[Point]:
    """Products around attention."""
    for inputs, outputs, sizes in (
        (2048, 5120, (1, 16, 64, 256, 1024, 4096, 16384)),
        (4096, 2048, (1, 32, 128, 512, 2048, 8192)),
    ):
        weight = CudaW4A8Weight(_random_weight(1, outputs, inputs, device), None)
        for tokens in sizes:
            x_TI = torch.randn(tokens, inputs, dtype=torch.bfloat16, device=device)
            yield Point(
                name=f"{tokens}, {inputs} to {outputs}",
                work=projection_work(
                    tokens,
                    inputs=inputs,
                    outputs=outputs,
                    weight_bits=weight_bits(RECIPE, inputs),
                ),
                run=partial(_project, x_TI, weight),
            )


def _project(x_TI: Tensor, weight: CudaW4A8Weight) -> Tensor:
    return weight.product(weight.encode(x_TI))


def _random_weight(experts: int, outputs: int, inputs: int, device: torch.device) -> PackedW4A8:
    """Codes without weights behind them; steps and offsets keep them within 8 bits."""
    assert RECIPE.group == BLOCK
    blocks = padded(inputs) // BLOCK
    size = experts, blocks, outputs
    step_EBO = torch.randint(1, 9, size, dtype=torch.int16, device=device)
    offset_EBO = torch.randint(16, 112, size, dtype=torch.int16, device=device)
    return PackedW4A8(
        RECIPE,
        inputs,
        torch.randint(0, 256, (*size, HALF), dtype=torch.uint8, device=device),
        torch.rand(experts, outputs, device=device) * 1e-3,
        step_EBO + offset_EBO * 256,
    )


def _random_rows(tokens: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    size = tokens, padded(width)
    codes = torch.randint(-127, 128, size, dtype=torch.int8, device=device)
    return codes, torch.rand(tokens, device=device) * 0.01


POINTS: dict[str, Callable[[torch.device], Iterator[Point]]] = {
    "prefill_attention": prefill_attention_points,
    "prefill_ffn": prefill_ffn_points,
    "decode_ffn": decode_ffn_points,
    "projection": projection_points,
}
"""Of each part but decode attention, whose points are plans."""
