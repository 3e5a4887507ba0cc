"""Puts the CPU's operators behind torch's CUDA ones; torch calls ``start`` at the end of its import."""

import ctypes
import os
import sysconfig
import warnings
from pathlib import Path

LIBRARIES = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "lib")


def start() -> None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import torch

    ctypes.CDLL(str(LIBRARIES / "libcuda.so.1"))  # for whoever opens it by this name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ops.load_library(LIBRARIES / "libsoftgpu_operators.so")
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)
    if os.environ["TRITON_INTERPRET"] == "1":
        from .interpreter import install

        install(LIBRARIES / "libsoftgpu.so")
