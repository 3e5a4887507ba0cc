"""C++ builds under ``build/tests``: what was compiled from the same text with the same options is kept."""

import fcntl
import functools
import hashlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILDS = ROOT / "build" / "tests"
FLAGS = ("-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", f"-I{ROOT / 'csrc'}")


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Builds of several pytest processes follow one another: each uses all cores."""
    BUILDS.mkdir(parents=True, exist_ok=True)
    with (BUILDS / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def compile_all(sources: Sequence[Path], flags: Sequence[str]) -> list[Path]:
    """The sources' objects, compiled as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda source: _compile(source, [*FLAGS, *flags]), sources))


def link(name: str, objects: Sequence[Path], flags: Sequence[str]) -> Path:
    """The program or library ``name`` of these objects."""
    return _made(BUILDS / name, ["g++", *flags, *map(str, objects), "-ldl"], inputs=objects)


def _compile(source: Path, flags: Sequence[str]) -> Path:
    options = hashlib.sha256(" ".join(flags).encode()).hexdigest()[:8]
    target = BUILDS / "objects" / f"{source.parent.name}-{source.stem}-{options}.o"
    return _made(target, ["g++", *flags, "-c", str(source)], inputs=[source, *_headers()])


def _made(target: Path, command: Sequence[str], inputs: Sequence[Path]) -> Path:
    """``target``, which ``command`` makes unless it did so from the same inputs."""
    record = target.with_name(f"{target.name}.made-from")
    made_from = "\n".join([_compiler(), *command, *map(_digest, inputs)])
    if not (target.exists() and record.exists() and record.read_text() == made_from):
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.unfinished")
        built = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        assert built.returncode == 0, built.stderr
        record.unlink(missing_ok=True)
        unfinished.replace(target)  # a process that has opened the old library keeps it
        record.write_text(made_from)
    return target


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def _headers() -> list[Path]:
    """All of them: any source may include any."""
    return sorted(header for folder in ("csrc", "tests") for header in (ROOT / folder).rglob("*.hpp"))


@functools.cache
def _compiler() -> str:
    said = subprocess.run(["g++", "-v"], capture_output=True, text=True, check=True)
    return said.stderr  # its version, and what it was built for
