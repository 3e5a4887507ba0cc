"""The C++ core's own tests: plain, and under the sanitizers."""

import os
import subprocess
from pathlib import Path

import pytest
from standin_driver import build_standin

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    [
        *(ROOT / "tests" / "cpp").glob("*.cpp"),
        *(f for f in (ROOT / "csrc").glob("*/*.cpp") if f.parent.name != "bindings"),
    ]
)
MODES = {
    "plain": ["-O2"],
    "address and undefined": ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-g", "-fsanitize=thread"],
}


@pytest.mark.parametrize("mode", MODES)
def test_core(mode, tmp_path):
    flags = ["-std=c++20", "-Wall", "-Wextra", "-Werror", "-pthread", "-ffp-contract=off", *MODES[mode]]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests' / 'cpp'}"]
    compile_one = ["xargs", "-P", str(os.cpu_count()), "-I{}", "g++", *flags, "-c", "{}"]
    built = subprocess.run(
        compile_one, input="\n".join(map(str, SOURCES)), cwd=tmp_path, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    objects = [str(o) for o in tmp_path.glob("*.o")]
    assert len(objects) == len(SOURCES)
    subprocess.run(["g++", *flags, *objects, "-ldl", "-o", "core"], cwd=tmp_path, check=True)
    standin = build_standin(tmp_path / "libcuda-standin.so", MODES[mode])
    environment = {**os.environ, "PIPELINE_EXT_LIBCUDA": str(standin)}
    ran = subprocess.run([tmp_path / "core"], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ", 0 failed checks" in ran.stdout
