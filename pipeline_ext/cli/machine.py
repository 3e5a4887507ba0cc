"""What is installed and what this machine has, as plain data."""

import ctypes
import importlib
import importlib.metadata
import os
import platform
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from .. import _C
from ..engines import devices
from ..errors import PipelineError


@dataclass(frozen=True)
class Library:
    """A library that may be missing: its version, or else why it cannot be used."""

    version: str | None
    problem: str | None = None


@dataclass(frozen=True)
class Gpu:
    """A GPU that torch sees."""

    name: str
    gib: float


@dataclass(frozen=True)
class Machine:
    """Versions, devices and settings.

    Attributes:
        pipeline_ext: version as installed; None: run from its sources.
        torch_cuda: the CUDA version torch was built with; None: a CPU build.
        libraries: those not every installation has, by name.
        core: path of the native core.
        compiler: what it was built with.
        cores: that this process may use.
        intra_op_threads: of torch, in this process.
        process_backends: of torch.distributed.
        cuda_library: where the CUDA driver is looked for.
        gpu_problem: why ranks cannot run on GPUs; None: they can.
        keeps_freed_memory: whether malloc could be told to keep freed memory, as pipelines want.
        malloc_variables: settings of malloc in the environment; some keep pipelines from that.
    """

    pipeline_ext: str | None
    python: str
    torch: str
    torch_cuda: str | None
    libraries: dict[str, Library]
    core: str
    compiler: str
    processor: str
    cores: int
    intra_op_threads: int
    process_backends: list[str]
    gpus: list[Gpu]
    cuda_library: str
    cuda_driver: Library
    gpu_problem: str | None
    keeps_freed_memory: bool
    malloc_variables: list[str]


def describe() -> Machine:
    """This machine. Imports what it reports on, and tells malloc to keep freed memory, as pipelines do."""
    cuda_library = os.environ.get("PIPELINE_EXT_LIBCUDA") or "libcuda.so.1"
    return Machine(
        pipeline_ext=_own_version(),
        python=platform.python_version(),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        libraries={name: library(name) for name in ("numpy", "matplotlib", "triton", "cupy")},
        core=_C.__file__,
        compiler=_C.compiler,
        processor=processor(),
        cores=len(os.sched_getaffinity(0)),
        intra_op_threads=torch.get_num_threads(),
        process_backends=_process_backends(),
        gpus=_gpus(),
        cuda_library=cuda_library,
        cuda_driver=cuda_driver(cuda_library),
        gpu_problem=_gpu_problem(),
        keeps_freed_memory=_C.keep_freed_memory(),
        malloc_variables=sorted(
            name for name in os.environ if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")
        ),
    )


def library(name: str) -> Library:
    """An importable module: its version, or why it cannot be imported."""
    try:
        return Library(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name == name:
            return Library(None, "is not installed")
        return Library(None, f"is installed without {error.name}")
    except Exception as error:  # a broken installation may raise anything
        return Library(None, f"does not import: {first_line(error)}")


def cuda_driver(path: str) -> Library:
    """The CUDA driver: the newest CUDA version it serves, or why it cannot be used."""
    version = ctypes.c_int()
    try:
        driver = ctypes.CDLL(path)
        status = driver.cuInit(0) or driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError) as error:  # no such library, or no such function in it
        return Library(None, first_line(error))
    if status:
        return Library(None, f"{path} opens, but answers with CUDA error {status}")
    return Library(f"{version.value // 1000}.{version.value % 1000 // 10}")


def processor() -> str:
    """The processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def first_line(error: Exception) -> str:
    """The first line of what an exception says, or its type where it says nothing."""
    return str(error).partition("\n")[0] or type(error).__name__


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("pipeline_ext")
    except importlib.metadata.PackageNotFoundError:
        return None


def _process_backends() -> list[str]:
    if not torch.distributed.is_available():
        return []
    return [name for name in ("gloo", "nccl", "mpi") if torch.distributed.is_backend_available(name)]


def _gpu_problem() -> str | None:
    try:
        devices.given(["cuda:0"])
    except PipelineError as error:
        return str(error)
    return None


def _gpus() -> list[Gpu]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about drivers, of which cuda_driver says more
        if not torch.cuda.is_available():
            return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(p.name, p.total_memory / 2**30) for p in properties]
