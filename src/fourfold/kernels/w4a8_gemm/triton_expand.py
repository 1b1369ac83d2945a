"""From packed nibbles to the 8-bit operands of two products, in registers.

Bit operations on single elements cost about two instructions a weight; here inline PTX works on the
four weights of a 32-bit word at once (2 to 3 instructions for four weights). Every form has a twin
in plain Triton, for the interpreter and as its oracle.

A form takes the tile [O, 64] of packed bytes and the group parameters of its rows, for the low and
for the high channels, as int32 [O, 1] (`group_words`); it returns the tile's low and high channels.
What they stand for is `decode_nibbles` times `CODE_UNIT`.
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.w4a8_gemm.packing import W4A8Recipe

CODE_UNIT = {
    W4A8Recipe.INT8_CHANNEL: 2.0**-4,  # the signed nibble is left in the high half of its byte
    W4A8Recipe.INT8_G128: 1.0,
    W4A8Recipe.INT8_G64: 1.0,
    W4A8Recipe.FP8_CHANNEL: 2.0**9,  # bit patterns 0..7 of e4m3 are multiples of 2^-9
    W4A8Recipe.FP8_G128: 2.0**6,  # so that 1 is the smallest normal e4m3 and 7 * 2^12 the largest
}
"""The scale of a code that an expanded weight of 1 stands for."""


@triton.jit
def group_words(group):
    """int16 `step | (offset << 8)` to int32: the step, and the offset in each of four bytes."""
    both = group.to(tl.int32)
    return both & 255, ((both >> 8) & 255) * 0x01010101


@triton.jit
def lookup_words(exponent):
    """Exponents to the e4m3 codes of 0..3 and of 4..7 times two to the exponent."""
    shift = exponent.to(tl.int32)
    return shift * 0x08080800 + 0x14100800, shift * 0x08080808 + 0x1E1C1A18


@triton.jit
def expand_int8_channel(packed, ASM: tl.constexpr):
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 t;
            shl.b32 t, $2, 4;
            and.b32 $0, t, 0xF0F0F0F0;
            and.b32 $1, $2, 0xF0F0F0F0;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = ((packed & 15) << 4).to(tl.int8, bitcast=True)
        high = (packed & 240).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def expand_int8_group(packed, low_step, low_offset, high_step, high_offset, ASM: tl.constexpr):
    low_step = tl.broadcast_to(low_step, packed.shape)
    low_offset = tl.broadcast_to(low_offset, packed.shape)
    high_step = tl.broadcast_to(high_step, packed.shape)
    high_offset = tl.broadcast_to(high_offset, packed.shape)
    if ASM:
        # No nibble * step + offset leaves its byte, so one multiply-add does four.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            and.b32 a, $2, 0x0F0F0F0F;
            shr.u32 b, $2, 4;
            and.b32 b, b, 0x0F0F0F0F;
            mad.lo.u32 a, a, $3, $7;
            mad.lo.u32 b, b, $11, $15;
            xor.b32 $0, a, 0x80808080;
            xor.b32 $1, b, 0x80808080;
            }""",
            "=r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
            [packed, low_step, low_offset, high_step, high_offset],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        nibble = packed.to(tl.int32)
        low = ((nibble & 15) * low_step + (low_offset & 255) - 128).to(tl.int8)
        high = ((nibble >> 4) * high_step + (high_offset & 255) - 128).to(tl.int8)
    return low, high


@triton.jit
def expand_fp8_channel(packed, ASM: tl.constexpr):
    if ASM:
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 a, b;
            shl.b32 a, $2, 4;
            shr.u32 b, $2, 4;
            lop3.b32 a, a, $2, 0x80808080, 0xE4;
            lop3.b32 b, $2, b, 0x80808080, 0xE4;
            and.b32 $0, a, 0x87878787;
            and.b32 $1, b, 0x87878787;
            }""",
            "=r,=r,r",
            [packed],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        low = (((packed & 8) << 4) | (packed & 7)).to(tl.int8, bitcast=True)
        high = ((packed & 128) | ((packed >> 4) & 7)).to(tl.int8, bitcast=True)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def expand_fp8_group(packed, of_0_to_3, of_4_to_7, ASM: tl.constexpr):
    of_0_to_3 = tl.broadcast_to(of_0_to_3, packed.shape)
    of_4_to_7 = tl.broadcast_to(of_4_to_7, packed.shape)
    if ASM:
        # A byte permute looks up four magnitudes; another spreads the nibbles' signs to bytes.
        low, high = tl.inline_asm_elementwise(
            """{
            .reg .b32 m, n, s, t, u;
            and.b32 m, $2, 0x77777777;
            shr.u32 n, m, 16;
            shl.b32 u, $2, 4;
            prmt.b32 s, u, $2, 0x5140;
            prmt.b32 t, u, $2, 0x7362;
            prmt.b32 m, $3, $7, m;
            prmt.b32 n, $3, $7, n;
            lop3.b32 $0, s, m, 0x80808080, 0xEC;
            lop3.b32 $1, t, n, 0x80808080, 0xEC;
            }""",
            "=r,=r,r,r,r,r,r,r,r,r,r",
            [packed, of_0_to_3, of_4_to_7],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        # Words of four bytes: the first two hold the low channels, the others the high ones.
        words = tl.reshape(packed, (packed.numel // 4, 2, 2))
        low_bytes, high_bytes = tl.split(tl.permute(words, (0, 2, 1)))
        low = _look_up(low_bytes, of_0_to_3, of_4_to_7)
        high = _look_up(high_bytes, of_0_to_3, of_4_to_7)
    return low.to(tl.float8e4nv, bitcast=True), high.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _look_up(pairs, of_0_to_3, of_4_to_7):
    nibble = tl.reshape(tl.join(pairs & 15, pairs >> 4), of_0_to_3.shape).to(tl.int32)
    word = tl.where((nibble & 4) != 0, of_4_to_7, of_0_to_3)
    return (((word >> ((nibble & 3) * 8)) & 127) | ((nibble & 8) << 4)).to(tl.int8)
