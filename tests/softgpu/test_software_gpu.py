"""The software GPU itself, under the real torch.cuda: what CUDA promises, and what it does not."""

import ctypes
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

if not (torch.cuda.is_available() and torch.cuda.get_device_name().startswith("software")):
    pytest.skip("make softgpu runs it: it needs the CUDA build of torch there", allow_module_level=True)

CONTROLS = ctypes.CDLL(str(Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "lib", "libsoftgpu.so")))
CONTROLS.standin_limit_memory.argtypes = [ctypes.c_int, ctypes.c_size_t]
CONTROLS.standin_fail_runtime.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_int]
CYCLES = 100_000_000  # of torch.cuda._sleep: 50 ms


def test_a_stream_that_does_not_wait_reads_what_is_not_there_yet():
    other = torch.cuda.Stream()
    x = torch.zeros(4, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(other):
        torch.cuda._sleep(CYCLES)
        x.add_(1)
    assert x.sum().item() == 0
    torch.cuda.current_stream().wait_stream(other)
    assert x.sum().item() == 4


def test_the_default_stream_waits_for_a_stream_that_blocks_it_and_for_no_other():
    torch.cuda.synchronize()
    for blocks, expected in ((True, 1), (False, 0)):
        stream = ctypes.c_void_p()
        cudart = ctypes.CDLL("libcudart.so.13")
        assert cudart.cudaStreamCreateWithFlags(ctypes.byref(stream), 0 if blocks else 1) == 0
        x = torch.zeros((), device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.value)):
            torch.cuda._sleep(CYCLES)
            x.add_(1)
        assert x.item() == expected
        torch.cuda.synchronize()


def test_new_memory_is_not_a_number():
    torch.cuda.empty_cache()
    assert torch.empty(2**22, device="cuda").isnan().all()


def test_memory_ends_on_one_device_and_not_on_another():
    torch.cuda.empty_cache()
    CONTROLS.standin_limit_memory(1, 2**22)
    try:
        torch.empty(2**24, dtype=torch.uint8, device="cuda:0")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**24, dtype=torch.uint8, device="cuda:1")
    finally:
        CONTROLS.standin_limit_memory(1, 0)
    torch.empty(2**24, dtype=torch.uint8, device="cuda:1")


def test_a_call_of_the_runtime_fails_when_it_is_told_to():
    event = torch.cuda.Event()
    event.record()
    CONTROLS.standin_fail_runtime(b"cudaEventQuery", 1, 700)
    torch.cuda.synchronize()
    assert event.query()
    with pytest.raises(RuntimeError, match="an illegal memory access"):
        event.query()
    assert event.query()


def test_a_second_peer_access_is_refused():
    cudart = ctypes.CDLL("libcudart.so.13")
    torch.cuda.set_device(0)
    assert cudart.cudaDeviceEnablePeerAccess(0, 0) == 101  # its own
    assert [cudart.cudaDeviceEnablePeerAccess(1, 0) for _ in range(2)][1] == 704
    cudart.cudaGetLastError()


def test_a_graph_runs_its_branches_in_either_order():
    seen = set()
    x = torch.zeros(2, device="cuda")
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        begin = torch.cuda.current_stream()
        side.wait_stream(begin)
        x[0].fill_(1)  # nothing says whether that comes before the next
        with torch.cuda.stream(side):
            x[1].copy_(x[0] * 2)
        begin.wait_stream(side)
    for _ in range(40):
        x.zero_()
        graph.replay()
        seen.add(x[1].item())
    assert seen == {0.0, 2.0}


def test_what_a_capture_forbids_ends_it():
    x = torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError, match="previous error during capture|not permitted"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()
    with pytest.raises(RuntimeError, match="unjoined work"):
        side = torch.cuda.Stream()
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                x * 2
    assert (x + 1).sum().item() == 6


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_the_cpus_gradients(layer):
    plain = layer(5, 7, num_layers=2, batch_first=True)
    x = torch.randn(3, 4, 5)
    expected = x.clone().requires_grad_()
    plain(expected)[0].square().sum().backward()
    theirs = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    found = x.cuda().requires_grad_()
    plain.cuda()(found)[0].square().sum().backward()
    assert torch.allclose(found.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-5)
    for p, grad in zip(plain.parameters(), theirs):
        assert torch.allclose(p.grad.cpu(), grad, rtol=1e-4, atol=1e-5)


def test_random_numbers_follow_the_seed_in_and_out_of_graphs():
    drawn = []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x = torch.rand(5, device="cuda")
    for draw in (lambda: torch.rand(5, device="cuda"), lambda: (graph.replay(), x.clone())[1]):
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            drawn.append(draw().cpu())
    for first, again, other in (drawn[:3], drawn[3:]):
        assert torch.equal(first, again) and not torch.equal(first, other)


def test_operators_on_two_devices_are_refused():
    with pytest.raises(RuntimeError, match="expected all tensors to be on the same device"):
        torch.ones(3, device="cuda:0") + torch.ones(3, device="cuda:1")


def test_kernels_of_lists_count_versions():
    x, y = torch.zeros(3, device="cuda"), torch.ones(3, device="cuda")
    before = x._version
    torch._foreach_add_([x], [y])
    assert x._version == before + 1


def test_dropout_keeps_its_share_and_scales_it():
    kept = F.dropout(torch.ones(10000, device="cuda"), 0.25)
    assert kept.unique().tolist() == pytest.approx([0, 4 / 3]) and abs(kept.mean().item() - 1) < 0.05


def test_kernels_of_triton_that_two_threads_launch_at_once_all_run():
    packing = pytest.importorskip("pipeline_ext.packing", reason="its kernels are Triton's")
    wrong = []

    def launch(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            given = [torch.full((8,), float(number), device="cuda")]
            buffer = torch.empty(32, dtype=torch.uint8, device="cuda")
            packer = packing.packer(packing.Layout.of(given), given)
            for _ in range(200):
                buffer.zero_()
                packer.pack(buffer)
                if not torch.equal(buffer.view(torch.float32), given[0]):
                    wrong.append(number)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=launch, args=(number,)) for number in (1, 2, 3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert not wrong
