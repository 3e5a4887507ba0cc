"""The packing kernels on a GPU: the interpreter's checks, CUDA graphs, streams."""

import pytest
import torch
from packing_cases import STRIDINGS, check_outside, check_pack, check_slots, check_unpack, mixed, poisoned, to

from pipeline_ext.packing import Layout, Packer
from pipeline_ext.packing.layout import FLOATING

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
WIRES = (None, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("wire", WIRES, ids=str)
def test_kernels_do_what_torch_does(wire, scaled):
    scale = 1 / 3 if scaled else 1.0
    floating = [tensor for tensor in mixed() if tensor.dtype in FLOATING]
    check_pack(mixed(STRIDINGS), wire, scale, scaled, "cuda")
    check_unpack(mixed(), wire, scale, scaled, device="cuda")
    check_unpack(floating, wire, scale, scaled, accumulate=True, device="cuda")


def test_more_elements_than_32_bits_count():
    tensor = torch.arange(7, dtype=torch.uint8, device="cuda").expand(2**32 // 7 + 1000, 7)
    layout = Layout.of([tensor])
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8, device="cuda")
    Packer(layout, [tensor]).pack(buffer)
    assert torch.equal(layout.views(buffer)[0], tensor)


def test_a_captured_graph_packs_what_the_packer_is_bound_to():
    first, second = ([to(tensor, "cuda") for tensor in mixed()] for _ in range(2))
    layout = Layout.of(first, torch.bfloat16)
    buffer, around = poisoned(layout, "cuda")
    packer = Packer(layout, first)
    packer.pack(buffer, launch=False)
    graph = torch.cuda.CUDAGraph()
    allocated = torch.cuda.memory_allocated()
    with torch.cuda.graph(graph):
        packer.pack(buffer)
    assert torch.cuda.memory_allocated() == allocated
    for tensors in (first, second):
        packer.rebind(tensors)
        graph.replay()
        check_slots(layout, buffer, tensors)
        check_outside(layout, around)


def test_two_streams_pack_side_by_side():
    sets = [[to(tensor, "cuda") for tensor in mixed()] for _ in range(2)]
    layout = Layout.of(sets[0], torch.bfloat16)
    buffers = [poisoned(layout, "cuda")[0] for _ in sets]
    packers = [Packer(layout, tensors) for tensors in sets]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in sets]
    for _ in range(20):
        for stream, packer, buffer in zip(streams, packers, buffers):
            with torch.cuda.stream(stream):
                packer.pack(buffer)
    torch.cuda.synchronize()
    for tensors, buffer in zip(sets, buffers):
        check_slots(layout, buffer, tensors)
