"""GPUs for machines without one: the stand-in driver, and torch.cuda's part played on CPU tensors.

What a stage computes runs on the host when it is enqueued, so that gradients can be compared, while all calls
of the driver are those of a GPU. A captured graph is replayed by running every torch operation of the capture
again, into the same memory.
"""

import contextlib
from ctypes import byref, c_int, c_uint, c_uint64, c_void_p

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline_ext.engines.cuda import torch_side

NOTE = "use"


class Double:
    """Replaces ``pipeline_ext.engines.cuda.torch_side``. A note in the driver's log marks each step's begin.

    Attributes:
        ranges: NVTX ranges, as they began.
        launches: of graphs.
        capturing: whether one is being captured.
        inputs_on_host: whether batches come from the host's memory.
    """

    def __init__(self, standin, devices=2):
        self.standin = standin
        self.devices = devices
        self.device = 0
        self.current = [0] * devices  # the handle of each device's current stream
        self.ranges = []
        self.open_ranges = 0
        self.profiled = False
        self.launches = 0
        self.capturing = False
        self.inputs_on_host = False
        self.generators = [_Generator() for _ in range(devices)]

    def num_devices(self):
        return self.devices

    def current_device(self):
        return self.device

    def stream(self, handle, device):
        return handle, device

    def callers(self, devices):
        return [self.current[device] for device in devices]

    def current_stream(self, device):
        return self.current[device.index], device.index

    @contextlib.contextmanager
    def in_turn_on(self, stream):
        before = self.current[self.device], self.device
        self.use(stream)
        yield
        self.use(before)

    def use(self, stream):
        handle, self.device = stream
        self.current[self.device] = handle
        self.standin.drain()  # what has been copied between devices is there
        self.standin.note(f"{NOTE} {self.standin.number(handle)}")

    def generator(self, device):
        return self.generators[device.index]

    def is_capturing(self, devices):
        return self.capturing

    def on(self, device):
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def restored(self, devices):
        device, current = self.device, list(self.current)
        try:
            yield
        finally:
            self.standin.drain()  # nor is memory freed that a copy writes to
            self.device, self.current = device, current

    def move_module(self, module, device):
        pass

    def move(self, value, device):
        return value

    def on_host(self, value):
        return self.inputs_on_host

    def empty(self, nbytes, device):
        return torch.empty(nbytes, dtype=torch.uint8)

    def a_profiler_listens(self):
        return self.profiled

    def push_range(self, name):
        self.ranges.append(name)
        self.open_ranges += 1

    def pop_range(self):
        self.open_ranges -= 1

    def GraphMemory(self, device):
        return _GraphMemory(device)

    def Graph(self, memory):
        return _Graph(self, memory.device)


class _Generator:
    """A GPU's: a seed, and the offset of the next number."""

    def __init__(self):
        self.state = 0, 0

    def manual_seed(self, seed):
        self.state = seed, 0

    def get_offset(self):
        return self.state[1]

    def set_offset(self, offset):
        self.state = self.state[0], offset

    def get_state(self):
        return self.state

    def set_state(self, state):
        self.state = state

    def rand_like(self, x):
        seed, offset = self.state
        self.state = seed, offset + 4
        return torch.rand(x.shape, generator=torch.Generator().manual_seed(seed + offset))


class _GraphMemory:
    def __init__(self, device):
        self.device = device

    def release(self):
        pass


class _Graph:
    """A capture of the stand-in driver, and of torch's operations."""

    def __init__(self, double, device):
        self.double = double
        self.device = device
        self.recorder = _Recorder()
        self.executable = c_void_p()

    @contextlib.contextmanager
    def capture(self):
        device, double, call = self.device, self.double, self.double.standin.call
        context, stream, graph = c_void_p(), c_void_p(), c_void_p()
        with contextlib.ExitStack() as undo:
            check(call("cuDevicePrimaryCtxRetain", 7000, byref(context), c_int(device.index)))
            undo.callback(call, "cuDevicePrimaryCtxRelease", 11000, c_int(device.index))
            check(call("cuCtxPushCurrent", 4000, context))
            undo.callback(call, "cuCtxPopCurrent", 4000, byref(context))
            check(call("cuStreamCreateWithPriority", 5050, byref(stream), c_uint(1), c_int(0)))
            undo.callback(call, "cuStreamDestroy", 4000, stream)
            undo.callback(lambda: call("cuGraphDestroy", 10000, graph) if graph else None)
            check(call("cuStreamBeginCapture", 10010, stream, c_int(1)))
            before, double.current[device.index] = double.current[device.index], stream.value
            double.capturing = True
            try:
                with self.recorder:
                    yield
            finally:
                self.recorder.take_back()
                double.capturing = False
                double.current[device.index] = before
                ended = call("cuStreamEndCapture", 10000, stream, byref(graph))
            check(ended)
            made = call("cuGraphInstantiateWithFlags", 11040, byref(self.executable), graph, c_uint64(0))
            check(made)

    def replay(self):
        self.double.launches += 1
        call, context = self.double.standin.call, c_void_p()
        with contextlib.ExitStack() as undo:
            check(call("cuDevicePrimaryCtxRetain", 7000, byref(context), c_int(0)))
            undo.callback(call, "cuDevicePrimaryCtxRelease", 11000, c_int(0))
            check(call("cuCtxPushCurrent", 4000, context))
            undo.callback(call, "cuCtxPopCurrent", 4000, byref(context))
            check(call("cuGraphLaunch", 10000, self.executable, c_void_p(self.double.current[0])))
        self.recorder.replay()

    def __del__(self):
        if self.executable:
            self.double.standin.call("cuGraphExecDestroy", 10000, self.executable)


_WRITTEN = ("running_mean", "running_var")  # by batch norm, of which its schema says nothing


class _Recorder(TorchDispatchMode):
    """Runs operations, can take back what they have written, and can run them again into the same memory."""

    def __init__(self):
        super().__init__()
        self.calls = []
        self.made = set()  # the addresses of memory that came into being
        self.before = {}  # by address: memory that was there already, and what it held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for argument, value in zip(function._schema.arguments, args):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written or argument.name in _WRITTEN:
                for tensor in tree_leaves(value):
                    storage = tensor.untyped_storage()
                    if storage.data_ptr() not in self.made | self.before.keys():
                        self.before[storage.data_ptr()] = storage, storage.clone()
        result = function(*args, **kwargs)
        self.calls.append((function, args, kwargs, result))
        given = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        self.made |= {t.untyped_storage().data_ptr() for t in _tensors(result)} - given
        return result

    def take_back(self):
        for storage, held in self.before.values():
            storage.copy_(held)
        self.before.clear()

    def replay(self):
        with torch.no_grad():
            for function, args, kwargs, result in self.calls:
                again = function(*args, **kwargs)
                for old, new in zip(_tensors(result), _tensors(again)):
                    # Of other shape is what was empty and has been given memory since.
                    if old.data_ptr() != new.data_ptr() and old.shape == new.shape:
                        old.copy_(new)


def _tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def check(result):
    if result != 0:
        raise RuntimeError(f"CUDA error {result}")


def install(monkeypatch, standin, devices=2):
    """Puts a ``Double`` in torch's place; returns it."""
    double = Double(standin, devices)
    for name in vars(torch_side):
        if hasattr(double, name) and callable(getattr(torch_side, name)):
            monkeypatch.setattr(torch_side, name, getattr(double, name))
    return double
