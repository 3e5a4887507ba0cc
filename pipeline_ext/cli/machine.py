"""What is installed, and what this machine has, as plain data."""

import ctypes
import importlib
import importlib.metadata
import os
import platform
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from .. import _C
from ..engines import devices
from ..errors import PipelineError


@dataclass(frozen=True)
class Library:
    """An optional library: its version, or why it cannot be used."""

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
        pipeline_ext: the installed version; None if it runs from its sources.
        torch_cuda: the CUDA version that torch was built for; None for a CPU build.
        libraries: optional libraries, by name.
        core: path of the native core.
        compiler: the compiler that built it.
        cores: number of cores that this process may use.
        intra_op_threads: torch's intra-op threads in this process.
        process_backends: backends of torch.distributed.
        process_problem: why processes cannot share a pipeline; None if they can.
        cuda_library: the CUDA driver's file.
        gpu_problem: why ranks cannot run on GPUs; None if they can.
        keeps_freed_memory: whether malloc keeps freed memory now, as pipelines want.
        malloc_variables: malloc's settings in the environment; some prevent that.
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
    process_problem: str | None
    gpus: list[Gpu]
    cuda_library: str
    cuda_driver: Library
    gpu_problem: str | None
    keeps_freed_memory: bool
    malloc_variables: list[str]


def describe() -> Machine:
    """Describes this machine. Imports the libraries, and tells malloc to keep freed memory, as pipelines do."""
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
        process_problem=_process_problem(),
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
    """A module's version, or why it cannot be imported."""
    try:
        return Library(importlib.import_module(name).__version__)
    except ModuleNotFoundError as error:
        if error.name == name:
            return Library(None, "is not installed")
        return Library(None, f"is installed without {error.name}")
    except Exception as error:  # a broken installation may raise anything
        return Library(None, f"does not import: {first_line(error)}")


def cuda_driver(path: str) -> Library:
    """The newest CUDA version that the driver supports, or why the driver cannot be used."""
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
    """The first line of an exception's message, or its type if the message is empty."""
    return str(error).partition("\n")[0] or type(error).__name__


def _own_version() -> str | None:
    try:
        return importlib.metadata.version("pipeline_ext")
    except importlib.metadata.PackageNotFoundError:
        return None


def _process_backends() -> list[str]:
    if not dist.is_available():
        return []
    return [name for name in ("gloo", "nccl", "mpi") if dist.is_backend_available(name)]


def _process_problem() -> str | None:
    """Why processes cannot share a pipeline: tries gloo between two threads, which add two numbers."""
    if "gloo" not in _process_backends():
        return "this torch is built without gloo, which connects processes"
    from torch._C._distributed_c10d import HashStore  # which torch without torch.distributed lacks

    patience = timedelta(seconds=10)
    store = HashStore()
    store.set_timeout(patience)

    def add(rank: int) -> float:
        number = torch.ones(())
        group = dist.ProcessGroupGloo(store, rank, 2, patience)
        group.allreduce(number).wait()  # type: ignore[attr-defined]  # torch's stubs leave it out
        return number.item()

    try:
        with ThreadPoolExecutor(2) as threads:
            sums = list(threads.map(add, range(2)))
    except Exception as error:  # gloo's own, torch's, or of the network
        return f"gloo cannot connect processes: {first_line(error)}"
    return None if sums == [2.0, 2.0] else f"gloo finds that 1 + 1 is {sums}"


def _gpu_problem() -> str | None:
    try:
        devices.given(["cuda:0"])
    except PipelineError as error:
        return str(error)
    return None


def _gpus() -> list[Gpu]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the driver; cuda_driver says more
        if not torch.cuda.is_available():
            return []
    properties = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [Gpu(p.name, p.total_memory / 2**30) for p in properties]
