"""What every kernel converts numbers with: e4m3 to and from float32, rounding to bfloat16, operands of a product.

Not every target can convert e4m3: sm_80 has no such type, gfx942 has another one, and Triton's interpreter rounds
wrongly. There tensors are passed as bytes and converted by `widen_e4m3` and `round_e4m3`, with integers.
"""

import triton
import triton.language as tl

from core.config import BLOCK_SIZE
from ops.gpu.device import interpreted

INTERPRETED = tl.constexpr(interpreted())
SCALE_BLOCK = tl.constexpr(BLOCK_SIZE)
TWO_TO_120 = tl.constexpr(2.0**120)


@triton.jit
def widen_e4m3(byte):
    """e4m3fn bytes (uint8) to float32, exactly: subnormals, both zeros and both NaNs included.

    Sign, exponent and mantissa are put in a float32's places; what is left is the difference of the biases, 127 - 7,
    and a multiplication by 2**120 makes it up, for subnormals too.
    """
    word = byte.to(tl.int8, bitcast=True).to(tl.int32) << 24
    value = ((word >> 4) & -0x78100000).to(tl.float32, bitcast=True) * TWO_TO_120
    return tl.where((word & 0x7F000000) == 0x7F000000, float("nan"), value)


@triton.jit
def round_e4m3(x, FNUZ: tl.constexpr = False):
    """float32 to e4m3fn bytes (uint8): nearest, ties to even; beyond the largest number, that number; NaN stays NaN.

    With FNUZ to e4m3fnuz: the same bits mean half the value, zero has no sign and NaN is 0x80.
    """
    bits = (x * 2 if FNUZ else x).to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    # Keep 3 of the 23 bits of mantissa: add half a unit, less one bit if the last kept bit is 0, and drop the rest.
    normal = ((magnitude + 0x0007FFFF + ((magnitude >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    # Below 2**-6 the unit is 2**-9, which is what the last bit of 2**14 is worth: this addition rounds to it.
    shifted = magnitude.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(magnitude < 0x3C800000, subnormal, normal)
    code = tl.minimum(code, 0x7F if FNUZ else 0x7E)
    sign = (bits >> 24) & 0x80
    if FNUZ:
        code = tl.where(magnitude > 0x7F800000, 0x80, tl.where(code == 0, 0, code | sign))
    else:
        code = tl.where(magnitude > 0x7F800000, 0x7F, code) | sign
    return code.to(tl.uint8)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 to dtype, to the nearest, ties to even (the interpreter by itself would cut a bfloat16 short)."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(dtype)


@triton.jit
def round_up_to_power_of_two(s):
    """The least power of two >= s, for positive normal float32 s; infinities and NaNs stay what they are."""
    bits = s.to(tl.int32, bitcast=True)
    return tl.where(bits < 0x7F800000, (bits + 0x007FFFFF) & 0x7F800000, bits).to(tl.float32, bitcast=True)


@triton.jit
def quantise(x, dtype: tl.constexpr, UE8M0: tl.constexpr, FNUZ: tl.constexpr):
    """float32 x (…, 128) to FP8 of the type (uint8: its bytes) and float32 scales (…). See reference.act_quant."""
    LAST: tl.constexpr = len(x.shape) - 1
    # Positive floats are ordered as their bits are, with NaN last: unlike a float maximum this keeps it. The other
    # number is 1e-4.
    amax = tl.maximum(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=LAST), 0x38D1B717)
    s = tl.div_rn(amax.to(tl.float32, bitcast=True), 240.0 if FNUZ else 448.0)
    if UE8M0:
        s = round_up_to_power_of_two(s)
    y = tl.div_rn(x, tl.broadcast_to(tl.expand_dims(s, LAST), x.shape))
    if dtype == tl.uint8:
        q = round_e4m3(y, FNUZ)
    else:
        q = y.to(dtype)
    return q, s


@triton.jit
def widen_int4(words, zero):
    """int32 words (N, W) of quantisation.interleave to their values less each row's zero point, uint8 (N,), or 8 where
    it is None: bfloat16 (N, 8 W), exactly.

    Bits 0x4300 before a nibble are 128 plus its value. Two nibbles that follow one another lie 16 bits apart, so that
    a mask makes a pair of bfloat16 numbers of both; and the order of the words is that in which the threads of a tensor
    core instruction hold channels, so that no number changes its thread.
    """
    first, second = _pairs(words), _pairs(words >> 4)
    third, fourth = _pairs(words >> 8), _pairs(words >> 12)
    pairs = tl.join(tl.join(first, second), tl.join(third, fourth))  # N, W, which of a pair, channels + 8, + 16
    units = tl.reshape(pairs, (words.shape[0], words.shape[1] // 4, 4, 2, 2, 2))
    order = tl.permute(units, (0, 1, 5, 4, 2, 3))
    values = tl.reshape(order, (words.shape[0], words.shape[1] * 8)).to(tl.bfloat16, bitcast=True)
    if INTERPRETED:  # its bfloat16 arithmetic is wrong
        values = values.to(tl.float32)
    if zero is None:
        return values - 136.0
    else:
        bias = (zero.to(tl.int16) | 0x4300).to(tl.bfloat16, bitcast=True)[:, None]
        return values - (bias.to(tl.float32) if INTERPRETED else bias)


@triton.jit
def _pairs(words):
    """The lowest nibbles of both halves of int32 words (…) as the bits of bfloat16 128 + nibble: int16 (…, 2)."""
    pair = (words & 0x000F000F) | 0x43004300
    return tl.join(pair.to(tl.int16), (pair >> 16).to(tl.int16))


@triton.jit
def dot_operand(tile, FP8: tl.constexpr):
    """A tile as the tensor core takes it: as it is in a product of FP8 by FP8, otherwise as bfloat16."""
    if tile.dtype == tl.uint8:
        tile = widen_e4m3(tile)
    if INTERPRETED:  # its products of anything but float32 are wrong
        return tile.to(tl.float32)
    else:
        return tile if FP8 else tile.to(tl.bfloat16)
