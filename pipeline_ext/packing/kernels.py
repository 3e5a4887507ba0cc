"""The Triton kernels: one launch copies every tensor of a layout into its buffer, or back.

A program copies one chunk of one slot, in blocks; two tables on the device say which chunk, and where it
lies (``tables``). The conversions are known when a kernel is compiled: KINDS lists the pairs (the tensor's
format, the slot's format) of a layout, and a program takes the branch of its slot's pair.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import tables
from .formats import arithmetic, decode, encode, format_of, storage

ADDRESS = tl.constexpr(tables.ADDRESS)
OFFSET = tl.constexpr(tables.OFFSET)
COUNT = tl.constexpr(tables.COUNT)
KIND = tl.constexpr(tables.KIND)
WIDE = tl.constexpr(tables.WIDE)
RANK = tl.constexpr(tables.RANK)
DIMENSIONS = tl.constexpr(tables.DIMENSIONS)
BLOCK = tl.constexpr(tables.BLOCK)
PART = tl.constexpr(tables.BLOCK // 4)  # elements at once without 128-bit accesses; saves registers


def constants(kinds: list[tuple[torch.dtype, torch.dtype]], room: int, largest: int) -> dict[str, Any]:
    """The compile-time arguments of a kernel.

    Args:
        kinds: pairs (type of a tensor, type of its slot).
        room: dimensions that a row of the table of slots has room for.
        largest: number of elements of the largest tensor.
    """
    return {
        "KINDS": tuple((format_of(tensor), format_of(wire)) for tensor, wire in kinds),
        "BLOCKS": (counts := tuple(tables.blocks(tensor) for tensor, _ in kinds)),
        "ROOM": room,
        # 64-bit division is slow
        "INDEX": tl.uint32 if largest < 2**32 - tables.BLOCK * max(counts, default=1) else tl.int64,
        "num_warps": 8,
        "enable_fp_fusion": False,  # for the same bits as on the CPU
    }


@triton.jit
def pack(
    chunks,
    slots,
    buffer,
    scale: tl.float64,
    scales,
    amax,
    nonfinite,
    KINDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Slot = tensor * scale, in the slot's format."""
    slot, row, chunk = _chunk(chunks, slots, ROOM)
    kind, count = tl.load(row + KIND), tl.load(row + COUNT)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            FROM: tl.constexpr = KINDS[k][0]
            WIRE: tl.constexpr = KINDS[k][1]
            factor = _factor(scale, scales, slot, FROM)
            tensor, wire = _pointers(row, buffer, FROM, WIRE)
            first = chunk * (BLOCK * BLOCKS[k])
            as_words = False
            if BLOCKS[k] > 1:
                as_words = first + BLOCK * BLOCKS[k] <= tl.load(row + WIDE)
            if as_words:
                _copy_words(tensor + first, wire + first)
            else:
                for block in range(BLOCKS[k]):
                    begin = first + block * BLOCK
                    if begin < tl.load(row + WIDE):
                        stored = tl.load(tl.multiple_of(tensor + begin, 16) + tl.arange(0, BLOCK))
                        target = wire + begin + tl.arange(0, BLOCK)
                        _pack(stored, target, None, slot, factor, amax, nonfinite, FROM, WIRE, SCALED)
                    elif begin < count:
                        for part in range(0, BLOCK, PART):
                            element = begin + part + tl.arange(0, PART)
                            inside = element < count
                            stored = tl.load(tensor + _strided(row, element, INDEX), inside, 0)
                            target = wire + element
                            _pack(stored, target, inside, slot, factor, amax, nonfinite, FROM, WIRE, SCALED)


@triton.jit
def unpack(
    chunks,
    slots,
    buffer,
    scale: tl.float64,
    scales,
    KINDS: tl.constexpr,
    BLOCKS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    SCALED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Tensor = slot * scale, or tensor += slot * scale."""
    slot, row, chunk = _chunk(chunks, slots, ROOM)
    kind, count = tl.load(row + KIND), tl.load(row + COUNT)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            TO: tl.constexpr = KINDS[k][0]
            WIRE: tl.constexpr = KINDS[k][1]
            factor = _factor(scale, scales, slot, TO)
            tensor, wire = _pointers(row, buffer, TO, WIRE)
            first = chunk * (BLOCK * BLOCKS[k])
            as_words = False
            if BLOCKS[k] > 1:
                as_words = first + BLOCK * BLOCKS[k] <= tl.load(row + WIDE)
            if as_words:
                _copy_words(wire + first, tensor + first)
            else:
                for block in range(BLOCKS[k]):
                    begin = first + block * BLOCK
                    if begin < tl.load(row + WIDE):
                        stored = tl.load(wire + begin + tl.arange(0, BLOCK))
                        target = tl.multiple_of(tensor + begin, 16) + tl.arange(0, BLOCK)
                        _unpack(stored, target, None, factor, WIRE, TO, SCALED, ACCUMULATE)
                    elif begin < count:
                        for part in range(0, BLOCK, PART):
                            element = begin + part + tl.arange(0, PART)
                            inside = element < count
                            stored = tl.load(wire + element, inside)
                            target = tensor + _strided(row, element, INDEX)
                            _unpack(stored, target, inside, factor, WIRE, TO, SCALED, ACCUMULATE)


@triton.jit
def _pack(
    stored,
    target,
    inside,
    slot,
    factor,
    amax,
    nonfinite,
    FROM: tl.constexpr,
    WIRE: tl.constexpr,
    SCALED: tl.constexpr,
):
    if FROM.is_floating():
        if amax is not None or nonfinite is not None:
            _observe(decode(stored, FROM, arithmetic(FROM)), slot, amax, nonfinite)
        if SCALED or FROM != WIRE:
            value = decode(stored, FROM, arithmetic(FROM))
            stored = encode(value * factor if SCALED else value, WIRE)
    tl.store(target, stored, inside)


@triton.jit
def _unpack(
    stored,
    target,
    inside,
    factor,
    WIRE: tl.constexpr,
    TO: tl.constexpr,
    SCALED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    if TO.is_floating() and (SCALED or ACCUMULATE or WIRE != TO):
        value = decode(stored, WIRE, arithmetic(TO))
        if SCALED:
            value *= factor
        if ACCUMULATE:
            value += decode(tl.load(target, inside), TO, arithmetic(TO))
        stored = encode(value, TO)
    tl.store(target, stored, inside)


@triton.jit
def _chunk(chunks, slots, ROOM: tl.constexpr):
    """The slot of this program, its row in the table, and the number of the chunk in the slot."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    slot = tl.load(chunk)
    return slot, slots + slot * (DIMENSIONS + 2 * ROOM), tl.load(chunk + 1).to(tl.int64)


@triton.jit
def _pointers(row, buffer, FORMAT: tl.constexpr, WIRE: tl.constexpr):
    """Pointers to the tensor and to its slot."""
    tensor = tl.load(row + ADDRESS).to(tl.pointer_type(storage(FORMAT)))
    offset = tl.multiple_of(tl.load(row + OFFSET), 16)
    wire = (buffer + offset).to(tl.pointer_type(storage(WIRE)), bitcast=True)
    return tensor, wire


@triton.jit
def _copy_words(source, target):
    """Copies a block of words, both aligned to 16 bytes."""
    word = tl.arange(0, BLOCK)
    source = tl.multiple_of(source.to(tl.pointer_type(tl.uint32), bitcast=True), 16)
    target = tl.multiple_of(target.to(tl.pointer_type(tl.uint32), bitcast=True), 16)
    tl.store(target + word, tl.load(source + word))


@triton.jit
def _strided(row, index, INDEX: tl.constexpr):
    """Offsets of the elements of these indices from the first one, in elements."""
    index = index.to(INDEX)
    offset = tl.zeros_like(index).to(tl.int64)
    outermost = tl.load(row + RANK) - 1
    d = 0
    while d < outermost:  # the interpreter of triton 3.6 does not accept range(outermost)
        size = tl.load(row + DIMENSIONS + 2 * d).to(INDEX)
        offset += (index % size).to(tl.int64) * tl.load(row + DIMENSIONS + 2 * d + 1)
        index = index // size
        d += 1
    return offset + index.to(tl.int64) * tl.load(row + DIMENSIONS + 2 * outermost + 1)


@triton.jit
def _factor(scale, scales, slot, FORMAT: tl.constexpr):
    factor = tl.full((), scale, tl.float64).to(arithmetic(FORMAT))
    if scales is not None:
        factor *= tl.load(scales + slot).to(arithmetic(FORMAT))
    return factor


@triton.jit
def _observe(value, slot, amax, nonfinite):
    """Raises the slot's entry of amax to the largest magnitude; sets nonfinite if that is not finite."""
    # As integers, magnitudes keep their order: numbers, infinity, NaN.
    BITS: tl.constexpr = tl.int64 if value.dtype == tl.float64 else tl.int32
    largest = tl.max(tl.abs(value).to(BITS, bitcast=True)).to(value.dtype, bitcast=True)
    if amax is not None:
        entry = (amax + slot).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_max(entry, largest.to(tl.float32).to(tl.int32, bitcast=True), sem="relaxed")
    if nonfinite is not None:  # noqa: SIM102  (Triton decides this one at compile time)
        if not (largest < float("inf")):
            tl.store(nonfinite, 1)
