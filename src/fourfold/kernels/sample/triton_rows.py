"""What a row asks for and what its logits are, as the kernels of `sample` read them.

A row's source is the tuple (its logits, the packed rows, its place, tallies, bitmap, biases,
V, W), handed on whole. Tallies and biases are read only where the bitmap says so.

Shapes: V vocabulary, W words of the bitmap, which is chunks.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.sample.choose import CHUNK
from fourfold.kernels.sample.params import ADJUSTED, BIASED, COLDEST, REPORTED, WORDS

WORDS_OF_A_ROW = tl.constexpr(WORDS)
COLD = tl.constexpr(COLDEST)
TOKENS_OF_A_CHUNK = tl.constexpr(CHUNK)
INFINITY = tl.constexpr(float("inf"))
_ADJUSTED = tl.constexpr(ADJUSTED)
_BIASED = tl.constexpr(BIASED)
_REPORTED = tl.constexpr(REPORTED)


@triton.jit
def word(rows, row, place: tl.constexpr):
    return tl.load(rows + row * WORDS_OF_A_ROW + place)


@triton.jit
def number(rows, row, place: tl.constexpr):
    return word(rows, row, place).to(tl.float32, bitcast=True)


@triton.jit
def is_adjusted(rows, row):
    return (word(rows, row, 11) & _ADJUSTED) != 0


@triton.jit
def is_biased(rows, row):
    return (word(rows, row, 11) & _BIASED) != 0


@triton.jit
def is_reported(rows, row):
    return (word(rows, row, 11) & _REPORTED) != 0


@triton.jit
def is_filtered(rows, row, V):
    """Whether a row that is drawn keeps only some tokens."""
    k = word(rows, row, 1)
    some = ((k > 0) & (k < V)) | (number(rows, row, 2) < 1.0)
    some = some | (number(rows, row, 3) < INFINITY)
    return some & (number(rows, row, 0) >= COLD)


@triton.jit
def _shifted(x, bits: tl.constexpr):
    return x ^ (x >> bits)


@triton.jit
def uniform(rows, row):
    """The row's number in [0, 1), float64: `params.uniform_numbers`."""
    low = word(rows, row, 8).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = word(rows, row, 9).to(tl.uint32, bitcast=True).to(tl.uint64)
    x = (low | (high << 32)) + word(rows, row, 10).to(tl.uint64)
    for _ in tl.static_range(2):
        x = x + 0x9E3779B97F4A7C15
        x = _shifted(x, 30) * 0xBF58476D1CE4E5B9
        x = _shifted(x, 27) * 0x94D049BB133111EB
        x = _shifted(x, 31)
    return (x >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def penalties_of(rows, row):
    """Repetition and its inverse, presence, frequency."""
    repetition = number(rows, row, 4)
    return repetition, tl.div_rn(1.0, repetition), number(rows, row, 5), number(rows, row, 6)


@triton.jit
def penalise(x, said, penalties):
    """Logits with penalties, from tallies that are 0 where a token was not said; float32."""
    repetition, inverse, presence, frequency = penalties
    seen = said.to(tl.int32, bitcast=True) != 0
    x = tl.where(seen, x * tl.where(x > 0, inverse, repetition), x)
    count = tl.abs(said)
    # Fused by hand: all kernels must round alike.
    x = tl.fma(count, tl.zeros_like(x) - frequency, x)
    return tl.fma(tl.minimum(count, 1.0), tl.zeros_like(x) - presence, x)


@triton.jit
def tallies(off, touched, source):
    """Tallies where `touched`, else 0."""
    _, rows, row, tally, _, _, V, _ = source
    return tl.load(tally + word(rows, row, 7).to(tl.int64) * V + off, touched, other=0.0)


@triton.jit
def biases(off, touched, source):
    """Biases where `touched`, else 0."""
    _, rows, row, _, _, bias, V, _ = source
    return tl.load(bias + word(rows, row, 7).to(tl.int64) * V + off, touched, other=0.0)


@triton.jit
def _adjust(x, off, touched, source):
    _, rows, row, _, _, _, _, _ = source
    x = penalise(x, tallies(off, touched, source), penalties_of(rows, row))
    if is_biased(rows, row):
        x += biases(off, touched, source)
    return x


@triton.jit
def touched_chunks(chunk, source):
    """Which tokens of chunks have a tally or a bias: one word of the bitmap each."""
    _, rows, row, _, words, _, _, W = source
    at = words + word(rows, row, 7).to(tl.int64) * W + chunk
    bit = 1 << tl.arange(0, TOKENS_OF_A_CHUNK)
    return (tl.load(at, chunk < W, other=0)[:, None] & bit[None, :]) != 0


@triton.jit
def chunk_tokens(chunk):
    return chunk[:, None] * TOKENS_OF_A_CHUNK + tl.arange(0, TOKENS_OF_A_CHUNK)[None, :]


@triton.jit
def chunk_logits(base, chunk, V):
    """Logits of chunks as they are, -inf past the vocabulary; float32 [chunks, tokens]."""
    off = chunk_tokens(chunk)
    return tl.load(base + off, off < V, other=-INFINITY).to(tl.float32)


@triton.jit
def chunks_of(chunk, source):
    """Adjusted logits of chunks; float32 [chunks, tokens]."""
    base, rows, row, _, _, _, V, _ = source
    x = chunk_logits(base, chunk, V)
    if is_adjusted(rows, row):
        x = _adjust(x, chunk_tokens(chunk), touched_chunks(chunk, source), source)
    return x


@triton.jit
def tokens_of(off, source):
    """Adjusted logits at `off`, -inf past the vocabulary; float32."""
    base, rows, row, _, words, _, V, W = source
    x = tl.load(base + off, off < V, other=-INFINITY).to(tl.float32)
    if is_adjusted(rows, row):
        at = words + word(rows, row, 7).to(tl.int64) * W + off // 32
        touched = (tl.load(at, off < V, other=0) >> (off % 32)) & 1
        x = _adjust(x, off, touched != 0, source)
    return x
