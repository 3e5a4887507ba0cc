"""Number formats in Triton: from the bits in memory to float32 or float64, and back.

bfloat16 and float8 are converted with integer arithmetic: Triton refuses float8_e4m3fn below sm_89, and its
interpreter rounds bfloat16 towards zero. So every device, and the interpreter, gives the same bits.
"""

import torch
import triton
import triton.language as tl

# 2 ** 120: the exponent bias of float8_e4m3fn is 7, that of float32 is 127.
_E4M3_UNIT = tl.constexpr(2.0**120)


_FLOATING = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
}
_BITS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}


def format_of(dtype: torch.dtype) -> tl.dtype:
    """The format of a torch type; for integers and booleans only the size matters."""
    return _FLOATING.get(dtype) or _BITS[dtype.itemsize]


@triton.constexpr_function
def storage(FORMAT):
    """The type to load and store values of a format as."""
    if FORMAT == tl.bfloat16:
        return tl.uint16
    return tl.uint8 if FORMAT.is_fp8() else FORMAT


@triton.constexpr_function
def arithmetic(FORMAT):
    """The type to compute in for tensors of a format."""
    return tl.float64 if FORMAT == tl.float64 else tl.float32


@triton.jit
def decode(stored, FORMAT: tl.constexpr, TO: tl.constexpr):
    """Bits in FORMAT as float32 or float64."""
    if FORMAT == tl.bfloat16:
        value = (stored.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif FORMAT == tl.float8e5:  # the upper half of a float16
        value = (stored.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif FORMAT == tl.float8e4nv:
        code = stored.to(tl.uint32)
        value = (((code & 0x80) << 24) | ((code & 0x7F) << 20)).to(tl.float32, bitcast=True)
        value = tl.where((code & 0x7F) == 0x7F, float("nan"), value * _E4M3_UNIT)
    else:
        value = stored
    return value.to(TO)


@triton.jit
def encode(value, FORMAT: tl.constexpr):
    """float32 or float64 numbers as bits in FORMAT, cast as torch does: rounded to nearest even.

    A number that is too large becomes infinity; float8_e4m3fn has none, so there it becomes the largest number.
    """
    if FORMAT == tl.float64:
        stored = value.to(tl.float64)
    elif FORMAT == tl.bfloat16:
        stored = _encode_bfloat16(value.to(tl.float32))
    elif FORMAT == tl.float8e4nv:
        stored = _encode_float8(value.to(tl.float32), 3, 7, 448.0)
    elif FORMAT == tl.float8e5:
        stored = _encode_float8(value.to(tl.float32), 2, 15, 65536.0)
    else:
        stored = value.to(tl.float32).to(FORMAT)
    return stored


@triton.jit
def _encode_bfloat16(value):
    bits = value.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(value == value, rounded, 0x7FC0).to(tl.uint16)


@triton.jit
def _encode_float8(value, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LARGEST: tl.constexpr):
    """LARGEST: the largest number, or the bits of infinity read as a number."""
    DROPPED: tl.constexpr = 23 - MANTISSA
    REBIAS: tl.constexpr = (127 - BIAS) << 23
    HALF: tl.constexpr = (1 << (DROPPED - 1)) - 1
    # The power of two whose last mantissa bit has the value of the last bit of a subnormal float8.
    MAGIC: tl.constexpr = 2.0 ** (24 - BIAS - MANTISSA)
    MAGIC_BITS: tl.constexpr = (127 + 24 - BIAS - MANTISSA) << 23
    SMALLEST_NORMAL: tl.constexpr = 2.0 ** (1 - BIAS)

    magnitude = tl.minimum(tl.abs(value), LARGEST)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = (bits + ((bits >> DROPPED) & 1) + (HALF - REBIAS)) >> DROPPED
    subnormal = (magnitude + MAGIC).to(tl.int32, bitcast=True) - MAGIC_BITS
    code = tl.where(magnitude < SMALLEST_NORMAL, subnormal, normal)
    code = tl.where(value == value, code, 0x7F)
    sign = (value.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)
