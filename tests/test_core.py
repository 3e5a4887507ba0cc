"""The C++ core's own tests: plain, and under the sanitizers."""

import os
import subprocess

import pytest
from native_builds import ROOT, compile_all, link, one_at_a_time
from standin_driver import build_standin

CORE = sorted(f for f in (ROOT / "csrc").glob("*/*.cpp") if f.parent.name != "bindings")
TESTS = sorted((ROOT / "tests" / "cpp").glob("*.cpp"))
MODES = {
    "plain": [],
    "address and undefined": ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-g1", "-fsanitize=thread"],
}


@pytest.mark.parametrize("mode", [pytest.param("plain", marks=pytest.mark.every), *list(MODES)[1:]])
def test_core(mode):
    standin = build_standin(["-O1", *MODES[mode]])
    with one_at_a_time():
        # There is more to compile than to run.
        flags = ["-O0", *MODES[mode], "-ffp-contract=off", f"-I{ROOT / 'tests' / 'cpp'}"]
        objects = compile_all([*CORE, *TESTS], flags)
        core = link(f"core, {mode}", objects, ["-pthread", *MODES[mode]])
    environment = {**os.environ, "PIPELINE_EXT_LIBCUDA": str(standin)}
    ran = subprocess.run([core], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ", 0 failed checks" in ran.stdout
