"""Triton's kernels by its interpreter, in place on the device's memory and in their stream's order."""

import ctypes
import importlib.util
import os
import threading
from pathlib import Path
from typing import Any

import torch

_BODY = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def install(library: Path) -> None:
    """Makes the interpreter run the kernels of CUDA tensors; nothing where triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime.interpreter import GridExecutor

    submit = ctypes.CDLL(str(library)).softgpu_submit
    submit.argtypes, submit.restype = [ctypes.c_void_p, _BODY, ctypes.c_void_p], None
    one_at_a_time = threading.RLock()  # the interpreter has but one state
    kept = []  # a graph may run a body at any later time
    interpret = GridExecutor.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        devices = {v.device for v in [*args, *kwargs.values()] if isinstance(v, torch.Tensor) and v.is_cuda}
        if not devices:
            return interpret(self, *args, **kwargs)
        current = torch.device("cuda", torch.cuda.current_device())
        if devices != {current}:
            raise RuntimeError(f"an illegal memory access: a kernel on {current} is given memory of {devices}")
        args = tuple(map(_on_host, args))
        kwargs = {name: _on_host(value) for name, value in kwargs.items()}

        def body(_: Any) -> None:
            try:
                with one_at_a_time:
                    interpret(self, *args, **kwargs)
            except BaseException as error:  # nobody would hear of it
                print("softgpu: a kernel of triton failed:", repr(error), flush=True)
                os._exit(70)

        in_c = _BODY(body)
        kept.append(in_c)  # another thread may append at any time, so its last one need not be this one
        submit(torch.cuda.current_stream().cuda_stream, in_c, None)
        return None

    GridExecutor._init_args_hst = lambda self, args, kwargs: (list(args), dict(kwargs))
    GridExecutor._restore_args_dev = lambda *_: None
    GridExecutor.__call__ = call


def _on_host(value: Any) -> Any:
    """The same memory as a tensor of the CPU's: flat, as a kernel sees no more than its address."""
    if not (isinstance(value, torch.Tensor) and value.is_cuda):
        return value
    if value.numel() == 0:
        return torch.empty(0, dtype=value.dtype)
    nbytes = value.element_size() * (1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride())))
    memory = (ctypes.c_char * nbytes).from_address(value.data_ptr())
    return torch.frombuffer(memory, dtype=torch.uint8).view(value.dtype)
