"""Builds the software GPU for the torch of this Python, as the libraries of NVIDIA's that torch looks for.

What is not of the software GPU, such as cuBLAS, becomes a library whose every function fails.
"""

import re
import subprocess
import sys
import sysconfig
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from native_builds import BUILDS, compile_all, link, one_at_a_time  # noqa: E402

SITE = Path(sysconfig.get_path("purelib"))
TORCH = SITE / "torch"
OUT = SITE / "nvidia" / "cu13" / "lib"  # where torch's libraries look
HEADERS = SITE / "triton" / "backends" / "nvidia" / "include"  # CUDA's

# Libraries whose symbols have no versions: what the names of their functions begin with.
PREFIXES = {
    "libnccl.so.2": "nccl",
    "libcusparseLt.so.0": "cusparseLt",
    "libcufile.so.0": "cuFile",
    "libnvshmem_host.so.3": "nvshmem",
    "libcurand.so.10": "curand",
    "libcuda.so.1": "cu(?!File)[A-Z]",
}
NVSHMEM = "libnvshmem_host.so.3"
# What torch compares with the version that it was built for.
VERSIONS = {
    "cudnnGetVersion": 92400,
    "cusparseLtGetVersion": 801,
    "cudnnGetCudartVersion": 13000,
    "cublasLtGetVersion": 130300,
}
OURS = {"libcudart.so.13": ["runtime"], "libcuda.so.1": ["driver", "driver_symbols"], "libnccl.so.2": ["nccl"]}
NOT_SUPPORTED = 801


def main() -> None:
    OUT.mkdir(parents=True, exist_ok=True)
    wanted, versions = wanted_symbols()
    shared = ["-fPIC", "-shared", "-O2", "-g1"]
    with one_at_a_time():
        machine = compile_all(sorted((HERE / "machine").glob("*.cpp")), shared)
        install("libsoftgpu.so", machine, shared)
        beside = [*shared, "-Wl,--no-as-needed", f"-L{OUT}", "-Wl,-rpath,$ORIGIN", "-l:libsoftgpu.so"]
        for name in sorted(wanted.keys() | OURS.keys()):
            ours = [HERE / f"{source}.cpp" for source in OURS.get(name, [])]
            objects = compile_all([s for s in ours if s.exists()], [*shared, "-isystem", str(HEADERS)])
            missing = wanted.get(name, set()) - defined(objects)
            objects += compile_all([stub(name, missing)], [*shared, "-Wno-unused-parameter"])
            script = BUILDS / f"{name}.map"
            script.write_text(f"{versions[name]} {{ global: *; }};\n" if name in versions else "")
            version = [f"-Wl,--version-script={script}"] if name in versions else []
            install(name, objects, [*(beside if ours else shared), f"-Wl,-soname,{name}", *version])
        include = [TORCH / "include", TORCH / "include" / "torch" / "csrc" / "api" / "include", HEADERS]
        flags = [*shared, "-O1", "-w", *(f"-isystem{folder}" for folder in include)]
        operators = compile_all([HERE / "operators.cpp", HERE / "own_operators.cpp"], flags)
        libraries = [f"-L{TORCH / 'lib'}", "-lc10", "-lc10_cuda", "-ltorch_cpu", "-ltorch_cuda"]
        install("libsoftgpu_operators.so", operators, [*beside, *libraries, "-Wl,--allow-shlib-undefined"])


def install(name: str, objects: Sequence[Path], flags: Sequence[str]) -> None:
    made = link(name, objects, flags)
    unfinished = OUT / f"{name}.unfinished"
    unfinished.write_bytes(made.read_bytes())
    unfinished.replace(OUT / name)


def wanted_symbols() -> tuple[dict[str, set[str]], dict[str, str]]:
    """The functions that torch's libraries need of others, and the version of their symbols, by library."""
    libraries = sorted((TORCH / "lib").glob("*.so*"))
    wanted: dict[str, set[str]] = defaultdict(set)
    versions: dict[str, str] = {}
    for library in libraries:
        needed = re.findall(r"NEEDED.*\[(.*)\]", output("readelf", "-dW", str(library)))
        for name in needed:
            if name.startswith(("libcu", "libnv", "libnccl")) and name not in {of.name for of in libraries}:
                wanted[name]
        for symbol in symbols(library, "--undefined-only"):
            name, _, version = symbol.partition("@")
            owner = NVSHMEM if version == "NVSHMEM" else version
            if owner.startswith(("libcu", "libnv")):
                wanted[owner].add(name)
                versions[owner] = version
            elif not version:
                for owner, prefix in PREFIXES.items():
                    if re.match(prefix, name):
                        wanted[owner].add(name)
    return wanted, versions


def stub(library: str, missing: Iterable[str]) -> Path:
    """A source with functions of these names, which fail."""
    lines = ["#include <cstdio>", "#include <cstdlib>", 'extern "C" {']
    for name in sorted(missing):
        said = f'if (std::getenv("SOFTGPU_LOUD")) std::fprintf(stderr, "softgpu: {name} is missing\\n");'
        code = VERSIONS.get(name, NOT_SUPPORTED if library.startswith("libcuda") else 1)
        lines.append(f"long {name}() {{ {'' if name in VERSIONS else said} return {code}; }}")
    source = BUILDS / "stubs" / f"{library}.cpp"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text("\n".join([*lines, "}", ""]))
    return source


def defined(objects: Iterable[Path]) -> set[str]:
    return {name for built in objects for name in symbols(built, "--defined-only", dynamic=False)}


def symbols(path: Path, kind: str, dynamic: bool = True) -> list[str]:
    options = ["-D"] if dynamic else []
    return [line.split()[-1] for line in output("nm", *options, kind, str(path)).splitlines() if line]


def output(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
