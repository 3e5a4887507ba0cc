"""The C++ core's own tests: plain, and under the sanitizers."""

import os
import re
import subprocess

import pytest
from core_builds import MODES, RANDOM_PLANS, build
from native_builds import ROOT
from standin_driver import build_standin

TESTS = sorted((ROOT / "tests" / "cpp").glob("*.cpp"))


@pytest.mark.parametrize("mode", [pytest.param("plain", marks=pytest.mark.every), *list(MODES)[1:]])
def test_core(mode):
    standin = build_standin(["-O1", *MODES[mode]])
    core = build("core", TESTS, mode)
    environment = {**os.environ, "PIPELINE_EXT_LIBCUDA": str(standin)}
    ran = subprocess.run([core], env=environment, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ", 0 failed checks" in ran.stdout


@pytest.mark.parametrize("mode", list(MODES)[1:])
def test_random_plans_are_executed_or_refused(mode):
    program = build("random plans", [RANDOM_PLANS], mode)
    ran = subprocess.run([program, "300", "60", "0"], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    plans, refused, executed = map(int, re.findall(r"\d+", ran.stdout)[:3])
    assert 0 < refused < plans and executed > 0
