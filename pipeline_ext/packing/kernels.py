"""The Triton kernels: one launch moves every tensor of a layout into its buffer, or back out.

A program moves one chunk of one slot; two tables on the device say which, and where it lies (``tables``). What
numbers to convert is known when a kernel is compiled: KINDS lists the pairs (the tensor's format, the format it
travels in) that a layout holds, and a program takes the branch of its slot's pair.
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
CHUNK = tl.constexpr(tables.CHUNK)
STEP = tl.constexpr(tables.CHUNK // 4)  # at a time, where 128-bit accesses cannot go; saves registers


def constants(kinds: list[tuple[torch.dtype, torch.dtype]], room: int, largest: int) -> dict[str, Any]:
    """What a kernel is compiled for, and how.

    Args:
        kinds: pairs (type of a tensor, type it travels as).
        room: dimensions that a row of the table of slots has room for.
        largest: most elements of a tensor.
    """
    return {
        "KINDS": tuple((format_of(tensor), format_of(wire)) for tensor, wire in kinds),
        "ROOM": room,
        "INDEX": tl.uint32 if largest < 2**32 - tables.CHUNK else tl.int64,  # 64-bit division is slow
        "num_warps": 8,
        "enable_fp_fusion": False,  # the same bits as elsewhere
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
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Slot = tensor * scale, in the format that travels."""
    slot, row, first, left = _chunk(chunks, slots, ROOM)
    kind = tl.load(row + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            FROM: tl.constexpr = KINDS[k][0]
            WIRE: tl.constexpr = KINDS[k][1]
            factor = _factor(scale, scales, slot, FROM)
            tensor, wire = _places(row, buffer, first, FROM, WIRE)
            if first < tl.load(row + WIDE):
                lane = tl.arange(0, CHUNK)
                stored = tl.load(tl.multiple_of(tensor + first, 16) + lane)
                _pack(stored, wire + lane, None, slot, factor, amax, nonfinite, FROM, WIRE, SCALED)
            else:
                for begin in range(0, CHUNK, STEP):
                    lane = begin + tl.arange(0, STEP)
                    inside = lane < left
                    stored = tl.load(tensor + _strided(row, first + lane, INDEX), inside, 0)
                    _pack(stored, wire + lane, inside, slot, factor, amax, nonfinite, FROM, WIRE, SCALED)


@triton.jit
def unpack(
    chunks,
    slots,
    buffer,
    scale: tl.float64,
    scales,
    KINDS: tl.constexpr,
    ROOM: tl.constexpr,
    INDEX: tl.constexpr,
    SCALED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
):
    """Tensor = slot * scale, or that added to it."""
    slot, row, first, left = _chunk(chunks, slots, ROOM)
    kind = tl.load(row + KIND)
    for k in tl.static_range(len(KINDS)):
        if kind == k:
            TO: tl.constexpr = KINDS[k][0]
            WIRE: tl.constexpr = KINDS[k][1]
            factor = _factor(scale, scales, slot, TO)
            tensor, wire = _places(row, buffer, first, TO, WIRE)
            if first < tl.load(row + WIDE):
                lane = tl.arange(0, CHUNK)
                stored = tl.load(wire + lane)
                target = tl.multiple_of(tensor + first, 16) + lane
                _unpack(stored, target, None, factor, WIRE, TO, SCALED, ACCUMULATE)
            else:
                for begin in range(0, CHUNK, STEP):
                    lane = begin + tl.arange(0, STEP)
                    inside = lane < left
                    stored = tl.load(wire + lane, inside)
                    target = tensor + _strided(row, first + lane, INDEX)
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
    """This program's slot, its row in the table, its first element, and how many are left from there."""
    chunk = chunks + 2 * tl.program_id(0).to(tl.int64)
    slot = tl.load(chunk)
    first = tl.load(chunk + 1).to(tl.int64) * CHUNK
    row = slots + slot * (DIMENSIONS + 2 * ROOM)
    return slot, row, first, tl.load(row + COUNT) - first


@triton.jit
def _places(row, buffer, first, FORMAT: tl.constexpr, WIRE: tl.constexpr):
    """Where the tensor begins, and where this chunk of its slot does."""
    tensor = tl.load(row + ADDRESS).to(tl.pointer_type(storage(FORMAT)))
    offset = tl.multiple_of(tl.load(row + OFFSET), 16)
    wire = (buffer + offset).to(tl.pointer_type(storage(WIRE)), bitcast=True)
    return tensor, wire + first


@triton.jit
def _strided(row, index, INDEX: tl.constexpr):
    """How far the elements of these indices lie from the first one, in elements."""
    index = index.to(INDEX)
    place = tl.zeros_like(index).to(tl.int64)
    outermost = tl.load(row + RANK) - 1
    d = 0
    while d < outermost:  # the interpreter of triton 3.6 takes no range(outermost)
        size = tl.load(row + DIMENSIONS + 2 * d).to(INDEX)
        place += (index % size).to(tl.int64) * tl.load(row + DIMENSIONS + 2 * d + 1)
        index = index // size
        d += 1
    return place + index.to(tl.int64) * tl.load(row + DIMENSIONS + 2 * outermost + 1)


@triton.jit
def _factor(scale, scales, slot, FORMAT: tl.constexpr):
    factor = tl.full((), scale, tl.float64).to(arithmetic(FORMAT))
    if scales is not None:
        factor *= tl.load(scales + slot).to(arithmetic(FORMAT))
    return factor


@triton.jit
def _observe(value, slot, amax, nonfinite):
    """Raises the slot's entry of amax to the largest magnitude here; sets the flag if that is not finite."""
    # As integers, magnitudes are in order: numbers, infinity, NaN.
    BITS: tl.constexpr = tl.int64 if value.dtype == tl.float64 else tl.int32
    largest = tl.max(tl.abs(value).to(BITS, bitcast=True)).to(value.dtype, bitcast=True)
    if amax is not None:
        entry = (amax + slot).to(tl.pointer_type(tl.int32), bitcast=True)
        tl.atomic_max(entry, largest.to(tl.float32).to(tl.int32, bitcast=True), sem="relaxed")
    if nonfinite is not None:
        if not (largest < float("inf")):
            tl.store(nonfinite, 1)
