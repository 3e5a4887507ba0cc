"""Processes with a GPU each, for machines without one: a stand-in driver and a ``Double`` in every process.

NCCL's part is played by CuPy's communicator as a fake, which moves bytes through the store, or by gloo.
"""

import contextlib
import ctypes
import functools
import itertools
import os
import sys
import weakref
from datetime import timedelta
from types import SimpleNamespace
from typing import NamedTuple

import device_double
import pytest
import torch
import torch.distributed as dist
from standin_driver import StandIn

from pipeline_ext.engines.cuda import nccl


class Sent(NamedTuple):
    """A send or receive of NCCL."""

    call: str
    way: str  # of those of one process: by the order in which they were made
    nbytes: int
    stream: int  # its handle


class Gpu(NamedTuple):
    """What a process has in place of a GPU and NCCL."""

    standin: StandIn
    double: device_double.Double
    calls: list[Sent]


def install(library, carrier):
    """Gives this process, which ends with the test, one GPU. ``carrier``: "CuPy" or "torch"."""
    os.environ["PIPELINE_EXT_LIBCUDA"] = str(library)
    standin = StandIn(library)
    standin.reset(1)
    patch = pytest.MonkeyPatch()
    double = device_double.install(patch, standin, devices=1)
    calls = []
    if carrier == "CuPy":
        fake = _fake_nccl(calls, double)
        patch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=SimpleNamespace(nccl=fake)))
        patch.setitem(sys.modules, "cupy.cuda", SimpleNamespace(nccl=fake))
    else:
        patch.setattr(dist, "ProcessGroupNCCL", dist.ProcessGroupGloo, raising=False)
        for name in ("send", "receive"):
            patch.setattr(nccl.TorchPair, name, _noted(calls, name, getattr(nccl.TorchPair, name), double))
    return Gpu(standin, double, calls)


_ways = weakref.WeakKeyDictionary()
_numbers = itertools.count()


def _noted(calls, name, method, double):
    def noted(pair, buffer):
        way = _ways.setdefault(pair, f"way {next(_numbers)}")
        calls.append(Sent(name, way, buffer.numel(), double.current[0]))
        method(pair, buffer)

    return noted


def _fake_nccl(calls, double):
    store = dist.distributed_c10d._get_default_store().clone()

    ends = []

    # As operations of torch they are captured, when they do nothing, and replayed.
    def move(call, buffer, end):
        if not double.capturing:
            getattr(ends[end], f"move_{call}")(buffer)

    library = torch.library.Library("fake_nccl", "DEF")
    library.define("send(Tensor buffer, int end) -> ()")
    library.define("receive(Tensor(a!) buffer, int end) -> ()")
    for call in ("send", "receive"):
        library.impl(call, functools.partial(move, call), "CPU")

    class NcclCommunicator:
        def __init__(self, size, number, rank):
            assert type(number) is bytes and len(number) == 128
            self.name, self.rank = number.hex(), rank
            self.numbers = itertools.count()
            self.aborted, self.awaited = False, ""
            # As NCCL: returns when all have called it.
            store.set(f"{self.name}/{rank}", "here")
            store.wait([f"{self.name}/{other}" for other in range(size)])
            self.size = size
            self.end = len(ends)
            ends.append(self)

        def send(self, address, count, kind, peer, stream):
            self._check("send", count, kind, peer, stream)
            assert self.rank == 0
            torch.ops.fake_nccl.send(_bytes_at(address, count), self.end)

        def recv(self, address, count, kind, peer, stream):
            self._check("receive", count, kind, peer, stream)
            assert self.rank == 1
            torch.ops.fake_nccl.receive(_bytes_at(address, count), self.end)

        def move_send(self, buffer):
            store.set(f"{self.name}/message {next(self.numbers)}", bytes(buffer.numpy()))

        def move_receive(self, buffer):
            self.awaited = f"{self.name}/message {next(self.numbers)}"
            with contextlib.suppress(dist.DistError):  # on a GPU no host would wait for it
                store.wait([self.awaited], timedelta(seconds=10))
                came = store.get(self.awaited)
                assert len(came) in (len(buffer), 0), "NCCL would hang, or write where it must not"
                if came:
                    buffer.copy_(torch.frombuffer(bytearray(came), dtype=torch.uint8))

        def allReduce(self, address, result, count, kind, how, stream):
            assert not self.aborted and address == result and how == "sum"
            values = _bytes_at(address, count * (8 if kind == torch.float64 else 4)).view(kind)
            number = next(self.numbers)
            store.set(f"{self.name}/{number}/{self.rank}", bytes(values.view(torch.uint8).numpy()))
            keys = [f"{self.name}/{number}/{rank}" for rank in range(self.size)]
            store.wait(keys)
            values.zero_()
            for key in keys:
                values += torch.frombuffer(bytearray(store.get(key)), dtype=kind)

        def abort(self):
            self.aborted = True
            store.clone().set(self.awaited, b"")

        def _check(self, call, count, kind, peer, stream):
            if self.aborted:
                raise RuntimeError("NCCL_ERROR_INVALID_ARGUMENT: invalid argument")
            assert kind == "uint8" and peer == 1 - self.rank
            calls.append(Sent(call, self.name, count, stream))

    return SimpleNamespace(
        library=library,  # whose operations are there as long as it is
        available=True,
        NCCL_UINT8="uint8",
        NCCL_FLOAT32=torch.float32,
        NCCL_FLOAT64=torch.float64,
        NCCL_SUM="sum",
        NcclCommunicator=NcclCommunicator,
        get_unique_id=lambda: os.urandom(128),
    )


def _bytes_at(address, count):
    return torch.frombuffer((ctypes.c_uint8 * count).from_address(address), dtype=torch.uint8)
