"""Our declarations of NVIDIA's driver API agree with NVIDIA's own headers."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def headers() -> Path:
    """The folder of cuda.h in triton's wheel."""
    triton = importlib.util.find_spec("triton")
    if triton is None:
        pytest.skip("needs triton, whose wheel has cuda.h")
    return Path(triton.origin).parent / "backends" / "nvidia" / "include"


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_our_declarations_of_the_driver_agree_with_cuda_h(headers):
    includes = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests'}", "-isystem", str(headers)]
    checked = subprocess.run(
        ["g++", "-fsyntax-only", "-std=c++20", *includes, ROOT / "tests" / "cpp_abi" / "cuda_abi.cpp"],
        capture_output=True,
        text=True,
    )
    assert checked.returncode == 0, checked.stderr
