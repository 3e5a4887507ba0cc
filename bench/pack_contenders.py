"""Ways to pack tensors into one buffer: ours, torch's, a plain CUDA kernel; and a copy of as many bytes."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline_ext.packing import Layout, packer

OURS = "pipeline_ext"
BOUND = "pipeline_ext, bound before"
RAW_KERNEL = "CuPy RawKernel"
CEILING = "a plain copy"
PEERS = ("torch.cat", "torch._foreach_copy_", "Tensor.copy_, one by one", RAW_KERNEL)

Call = Callable[[], object]

_SOURCE = """
extern "C" __global__ void pack(const unsigned long long* tensors, uint4* out, long long count) {
  const uint4* in = reinterpret_cast<const uint4*>(tensors[blockIdx.y]);
  out += blockIdx.y * count;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    out[i] = in[i];
  }
}
"""
_THREADS, _LOADS = 256, 4  # of a block; of a thread


def contenders(tensors: list[Tensor], wire: torch.dtype) -> dict[str, Call]:
    """Name -> what packs the tensors, all of one size and type; all write to the same memory.

    The plain copy reads and writes as many bytes as packing does. On the CPU ours is bound to the tensors in
    each call, as the engine does it, and once more bound before; on a GPU bound before.
    """
    count, length, device = len(tensors), tensors[0].numel(), tensors[0].device
    layout = Layout.of(tensors, None if wire == tensors[0].dtype else wire)
    ours = packer(layout, tensors)
    traffic = count * length * (tensors[0].itemsize + wire.itemsize)
    source = torch.zeros(traffic // 2, dtype=torch.uint8, device=device)
    buffer = torch.zeros(max(layout.nbytes, len(source)), dtype=torch.uint8, device=device)
    target = buffer[: len(source)]
    joined = buffer[: count * length * wire.itemsize].view(wire)
    views = list(joined.split(length))

    def bind_and_pack() -> None:
        ours.rebind(tensors)
        ours.pack(buffer)

    def one_by_one() -> None:
        for view, tensor in zip(views, tensors):
            view.copy_(tensor)

    bound = functools.partial(ours.pack, buffer)
    calls: dict[str, Call] = {OURS: bind_and_pack, BOUND: bound} if device.type == "cpu" else {OURS: bound}
    calls["torch.cat"] = functools.partial(torch.cat, tensors, out=joined)
    calls["torch._foreach_copy_"] = functools.partial(torch._foreach_copy_, views, tensors)
    calls["Tensor.copy_, one by one"] = one_by_one
    if device.type == "cuda" and wire == tensors[0].dtype and not left_out():
        calls[RAW_KERNEL] = _raw_kernel(tensors, buffer)
    calls[CEILING] = _memcpy(target, source) if device.type == "cpu" else lambda: target.copy_(source)
    return calls


def left_out() -> dict[str, str]:
    """Contenders on a GPU that are missing -> why."""
    return {} if importlib.util.find_spec("cupy") else {RAW_KERNEL: "cupy is not installed"}


def _memcpy(target: Tensor, source: Tensor) -> Call:
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    return lambda: memcpy(target.data_ptr(), source.data_ptr(), source.nbytes)


def _raw_kernel(tensors: list[Tensor], buffer: Tensor) -> Call:
    """One launch, accesses of 128 bits, a table of addresses on the device; it only copies."""
    import cupy

    kernel = cupy.RawKernel(_SOURCE, "pack")
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], device="cuda")
    count = tensors[0].nbytes // 16
    grid = -(-count // (_THREADS * _LOADS)), len(tensors)

    def call() -> None:
        with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            kernel(grid, (_THREADS,), (addresses.data_ptr(), buffer.data_ptr(), count))

    return call
