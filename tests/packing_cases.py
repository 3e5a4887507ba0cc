"""Tensors to pack, and what packing and unpacking them has to do, whichever packer does it."""

import math

import torch
from hypothesis import strategies as st

from pipeline_ext.packing import Layout
from pipeline_ext.packing.layout import FLOATING, SIGNED, UNSIGNED

POISON = 0xA5
GUARD = 512  # bytes before and behind a buffer
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-45, 6e-8, 1e-5, 448.0, 464.1, 6.1e4, 65520.0, 3.4e38)
WIRES = (None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
STRIDINGS = ("row-major", "reversed", "every second", "misaligned", "expanded")


def values(dtype, shape, special=0, magnitude=1.0):
    """Random numbers, ``special`` of them awkward; random bits for integers."""
    count = math.prod(shape)
    if dtype in FLOATING:
        flat = (torch.randn(count, dtype=torch.float64) * magnitude).to(dtype)
        for i in torch.randperm(count)[:special].tolist():
            flat[i : i + 1] = torch.tensor([SPECIAL[i % len(SPECIAL)]], dtype=torch.float64).to(dtype)
    elif dtype == torch.bool:
        flat = torch.rand(count) < 0.5
    else:
        flat = torch.randint(256, (count * dtype.itemsize,), dtype=torch.uint8).view(dtype)
    return flat.view(shape)


def strided(tensor, striding):
    """The same values in memory of their own, strided in one of STRIDINGS."""
    shape = tuple(tensor.shape)
    if striding == "reversed":
        back = tuple(reversed(range(len(shape))))
        return torch.empty(shape[::-1], dtype=tensor.dtype).permute(back).copy_(tensor)
    if striding == "every second" and shape:
        return torch.empty(*shape[:-1], 2 * shape[-1], dtype=tensor.dtype)[..., ::2].copy_(tensor)
    if striding == "misaligned":
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(shape).copy_(tensor)
    if striding == "expanded" and shape:
        return tensor[:1].clone().expand(shape)
    return tensor.clone()


def mixed(strides=STRIDINGS[:4]):
    """Tensors of every type and size: none, one, some, and several chunks."""
    shapes = ((5, 7), (0, 3), (), (65, 130), (3, 4, 5, 6), (4096,), (1,))
    dtypes = (*FLOATING, *SIGNED, *UNSIGNED)
    return [
        strided(values(dtype, shapes[i % len(shapes)]), strides[i % len(strides)])
        for i, dtype in enumerate(dtypes * 2)
    ]


@st.composite
def tensors(draw, stridings=STRIDINGS, dtypes=(*FLOATING, torch.int16, torch.int64, torch.bool)):
    """Up to four tensors of any type, shape, strides and values."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    magnitude = 10.0 ** draw(st.integers(-9, 6))
    shapes = st.one_of(
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        st.sampled_from([(4095,), (4096,), (4097,), (2, 4100), (91, 93)]),
    )
    return [
        strided(
            values(draw(st.sampled_from(dtypes)), draw(shapes), draw(st.sampled_from([0, 9])), magnitude),
            draw(st.sampled_from(stridings)),
        )
        for _ in range(draw(st.integers(0, 4)))
    ]


def arithmetic(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def cast(value, dtype):
    """As torch casts to float8_e4m3fn since it saturates, whatever its version."""
    return (value.clamp(-448, 448) if dtype == torch.float8_e4m3fn else value).to(dtype)


def factor(dtype, scale, scales, i):
    own = torch.ones(()) if scales is None else scales[i].cpu()
    return torch.tensor(scale, dtype=arithmetic(dtype)) * own.to(arithmetic(dtype))


def packed(tensor, wire, by):
    """What a slot holds."""
    if tensor.dtype not in FLOATING or (tensor.dtype == wire and by == 1):
        return tensor.contiguous()
    return cast(tensor.to(by.dtype) * by, wire)


def unpacked(slot, tensor, by, accumulate):
    """What becomes of a tensor."""
    if tensor.dtype not in FLOATING or (tensor.dtype == slot.dtype and by == 1 and not accumulate):
        return slot
    value = slot.to(by.dtype) * by
    return cast(tensor.to(by.dtype) + value if accumulate else value, tensor.dtype)


def same(a, b):
    """Whether two tensors have the same bits, any NaN being like any other."""
    if a.dtype in FLOATING:
        a, b = (torch.where(t.isnan(), math.nan, t).view(torch.int64) for t in (a.double(), b.double()))
    return torch.equal(a, b)


def poisoned(layout, device):
    """A buffer with poison in it, before it and behind it; and all of that."""
    around = torch.full((layout.nbytes + 2 * GUARD,), POISON, dtype=torch.uint8, device=device)
    return around[GUARD:-GUARD], around


def check_outside(layout, around):
    """Nothing but slots was written."""
    outside = around.cpu().clone()
    for slot in layout.slots:
        outside[GUARD + slot.offset : GUARD + slot.offset + slot.nbytes] = POISON
    assert (outside == POISON).all()


def check_slots(layout, buffer, tensors, scale=1.0, scales=None):
    """Every slot of a packed buffer holds what it should."""
    for i, (slot, view, tensor) in enumerate(zip(layout.slots, layout.views(buffer.cpu()), tensors)):
        by = factor(slot.dtype, scale, scales, i)
        assert same(view, packed(tensor.cpu(), slot.wire, by)), slot


def check_pack(make, tensors, wire=None, scale=1.0, scaled=False, device="cpu"):
    """Packs, with everything that packing tells, and checks all of it; ``make`` makes the packer."""
    tensors = [to(tensor, device) for tensor in tensors]
    layout = Layout.of(tensors, wire)
    buffer, around = poisoned(layout, device)
    scales = torch.rand(len(tensors), device=device) + 0.5 if scaled else None
    amax = torch.zeros(len(tensors), device=device)
    nonfinite = torch.zeros(1, dtype=torch.int32, device=device)

    make(layout, tensors).pack(buffer, scale, scales=scales, amax=amax, nonfinite=nonfinite)

    check_slots(layout, buffer, tensors, scale, scales)
    check_outside(layout, around)
    floats = [t.to(arithmetic(t.dtype)) if t.dtype in FLOATING else torch.zeros(0) for t in tensors]
    largest = [f.abs().max().float().cpu() if f.numel() else torch.zeros(()) for f in floats]
    assert same(amax.cpu(), torch.stack(largest) if largest else torch.zeros(0))
    assert nonfinite.item() == any(not f.isfinite().all() for f in floats)


def check_unpack(make, tensors, wire=None, scale=1.0, scaled=False, accumulate=False, device="cpu"):
    """Unpacks into tensors of these strides; checks them, and the memory between their elements."""
    tensors = [to(tensor, device) for tensor in tensors]
    layout = Layout.of(tensors, wire)
    buffer, _ = poisoned(layout, device)
    for view, tensor in zip(layout.views(buffer), tensors):
        sent = values(tensor.dtype, tensor.shape, special=3)
        view.copy_(packed(sent, view.dtype, factor(tensor.dtype, 1.0, None, 0)))
    scales = torch.rand(len(tensors), device=device) + 0.5 if scaled else None
    expected = [to(tensor, "cpu") for tensor in tensors]
    for i, (slot, tensor) in enumerate(zip(layout.views(buffer.cpu()), expected)):
        by = factor(tensor.dtype, scale, scales, i)
        tensor.copy_(unpacked(slot, tensor, by, accumulate))

    make(layout, tensors).unpack(buffer, scale, scales=scales, accumulate=accumulate)

    for tensor, after in zip(tensors, expected):
        assert same(whole(tensor).cpu(), whole(after))


def whole(tensor):
    """All the memory that a tensor's storage has, as one row."""
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())


def to(tensor, device):
    """A copy with the same strides in memory of its own, the rest of the memory included."""
    return (
        whole(tensor).to(device, copy=True).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    )
