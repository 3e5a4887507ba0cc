"""Packing on a GPU: what holds on the CPU, and CUDA graphs, streams, CuPy's arrays."""

import pytest
import torch
from packing_cases import (
    STRIDINGS,
    WIRES,
    check_outside,
    check_pack,
    check_slots,
    check_unpack,
    mixed,
    poisoned,
    same,
    to,
)

import pipeline_ext as pe
from pipeline_ext.packing import Layout, packer
from pipeline_ext.packing.layout import FLOATING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


def on_gpu(tensors):
    return [to(tensor, "cuda") for tensor in tensors]


def equal(a, b):
    """Whether two tensors hold the same numbers, 0 and -0 being one."""
    return torch.equal(a.double(), b.double())


def allocations():
    """How many times memory of the device was asked for so far."""
    return torch.cuda.memory_stats()["allocation.all.allocated"]


def captured(call):
    """A graph of what ``call`` launches, in which nothing is allocated."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        before = allocations()
        call()
        assert allocations() == before
    return graph


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_kernels_do_what_torch_does(wire, scaled):
    scale = 1 / 3 if scaled else 1.0
    floating = [tensor for tensor in mixed() if tensor.dtype in FLOATING]
    check_pack(packer, mixed(STRIDINGS), wire, scale, scaled, "cuda")
    check_unpack(packer, mixed(), wire, scale, scaled, device="cuda")
    check_unpack(packer, floating, wire, scale, scaled, accumulate=True, device="cuda")


def test_more_elements_than_32_bits_count():
    if torch.cuda.mem_get_info()[0] < 2**34:
        pytest.skip("needs 16 GiB of the GPU's memory")
    tensor = torch.arange(7, dtype=torch.uint8, device="cuda").expand(2**32 // 7 + 1000, 7)
    layout = Layout.of([tensor])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    packer(layout, [tensor]).pack(buffer)
    assert torch.equal(layout.views(buffer)[0], tensor)
    back = torch.zeros(tensor.shape[::-1], dtype=torch.uint8, device="cuda").t()
    packer(layout, [back]).unpack(buffer)
    assert torch.equal(back, tensor)


def test_a_captured_pack_moves_the_tensors_that_are_bound_when_it_is_replayed():
    first, second = on_gpu(mixed()), on_gpu(mixed(STRIDINGS))
    layout = Layout.of(first, torch.float8_e4m3fn)
    buffer, around = poisoned(layout, "cuda")
    scales = torch.rand(len(first), device="cuda") + 0.5
    told = {
        "amax": torch.zeros(len(first), device="cuda"),
        "nonfinite": torch.zeros(1, dtype=torch.int32, device="cuda"),
    }
    packs = packer(layout, first)
    packs.pack(buffer, scales=scales, **told, launch=False)
    assert (around == around[0]).all()
    graph = captured(lambda: packs.pack(buffer, scales=scales, **told))
    for tensors in (first, second):
        packs.rebind(tensors)
        scales.mul_(1.5)
        graph.replay()
        check_slots(layout, buffer, tensors, 1.0, scales)
        check_outside(layout, around)
    assert told["amax"].max() > 0 and told["nonfinite"].item() == 0


@pytest.mark.parametrize("accumulate", [False, True])
def test_a_captured_unpack_writes_what_the_buffer_holds_when_it_is_replayed(accumulate):
    sent = on_gpu([tensor for tensor in mixed() if tensor.dtype in FLOATING])
    layout = Layout.of(sent)
    buffer, _ = poisoned(layout, "cuda")
    received = [torch.zeros_like(tensor) for tensor in sent]
    packs, unpacks = packer(layout, sent), packer(layout, received)
    unpacks.unpack(buffer, accumulate=accumulate, launch=False)
    graph = captured(lambda: unpacks.unpack(buffer, accumulate=accumulate))
    packs.pack(buffer)
    graph.replay()
    assert all(map(equal, received, sent))
    graph.replay()
    assert all(map(equal, received, [2 * tensor.double() if accumulate else tensor for tensor in sent]))


def test_two_streams_pack_and_unpack_side_by_side():
    sent, received = ([on_gpu(mixed()) for _ in range(2)] for _ in range(2))
    layout = Layout.of(sent[0])
    buffers = [poisoned(layout, "cuda")[0] for _ in sent]
    packs, unpacks = ([packer(layout, tensors) for tensors in side] for side in (sent, received))
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sent]
    for _ in range(20):
        for stream, pack, unpack, buffer in zip(streams, packs, unpacks, buffers):
            with torch.cuda.stream(stream):
                pack.pack(buffer)
                unpack.unpack(buffer)
    torch.cuda.synchronize()
    for before, after in zip(sent, received):
        assert all(map(same, before, after))


def test_what_one_stream_packs_another_unpacks_after_an_event():
    sent, received = on_gpu(mixed()), on_gpu(mixed())
    layout = Layout.of(sent)
    buffer, _ = poisoned(layout, "cuda")
    packs, unpacks = packer(layout, sent), packer(layout, received)
    torch.cuda.synchronize()
    packing, unpacking = torch.cuda.Stream(), torch.cuda.Stream()
    packed, unpacked = torch.cuda.Event(), torch.cuda.Event()
    for _ in range(20):
        with torch.cuda.stream(packing):
            packing.wait_event(unpacked)
            buffer.zero_()
            packs.pack(buffer)
            packed.record()
        with torch.cuda.stream(unpacking):
            unpacking.wait_event(packed)
            unpacks.unpack(buffer)
            unpacked.record()
    torch.cuda.synchronize()
    assert all(map(same, sent, received))


def test_cupys_arrays_are_taken_wherever_tensors_are():
    cupy = pytest.importorskip("cupy", reason="cupy is not installed")
    if torch.cuda.get_device_name().startswith("software"):
        pytest.skip("a software GPU runs no kernels that CuPy made")
    given = [torch.randn(40, 60, device="cuda").t(), torch.tensor([1, 2, 3], device="cuda")]
    arrays = [cupy.from_dlpack(tensor) for tensor in given]
    back = [cupy.zeros_like(array) for array in arrays]
    layout = Layout.of(arrays)
    assert layout == Layout.of(given)
    buffer = cupy.zeros(layout.nbytes, dtype=cupy.uint8)
    amax = cupy.zeros(2, dtype=cupy.float32)
    packs = packer(layout, arrays)
    packs.pack(buffer, amax=amax)
    check_slots(layout, torch.from_dlpack(buffer), given)
    assert float(amax[0]) == given[0].abs().max().item()
    packs.rebind(back)
    packs.unpack(buffer)
    assert all(bool((a == b).all()) for a, b in zip(arrays, back))


@pytest.mark.parametrize(
    "use, said",
    [
        (lambda p, b, t: p.pack(b.cpu()), "the buffer is on cpu; the packer is on cuda:0"),
        (lambda p, b, t: p.pack(b[:-1]), "the buffer has 263 bytes; the layout needs 264"),
        (lambda p, b, t: p.pack(b, amax=torch.zeros(2)), "amax is on cpu; the packer is on cuda:0"),
        (lambda p, b, t: p.unpack(b, accumulate=True), r"tensor 1 is int64\[1\]; only floating-point types"),
        (lambda p, b, t: p.rebind([t[0], t[1].cpu()]), "tensor 1 is on cpu; the packer is on cuda:0"),
        (lambda p, b, t: p.rebind(t[:1]), "1 tensors; the layout has 2 slots"),
        (
            lambda p, b, t: packer(Layout.of(t), [t[0].cpu(), t[1]]),
            "tensor 1 is on another device; the packer is on cpu",
        ),
    ],
)
def test_what_does_not_fit_is_refused(use, said):
    tensors = [torch.zeros(2, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")]
    layout = Layout.of(tensors)
    buffer, around = poisoned(layout, "cuda")
    with pytest.raises(pe.InvalidArgument, match=said):
        use(packer(layout, tensors), buffer, tensors)
    assert (around == around[0]).all()
