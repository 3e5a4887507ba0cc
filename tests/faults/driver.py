"""Each call of the CUDA driver failing: the tests of the suite that script the stand-in driver's errors."""

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

_TESTS = "test_device_failure.py"


@dataclass
class Driver:
    passed: int
    failed: bool
    said: str


def run() -> Driver:
    here = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", _TESTS]
    ran = subprocess.run(command, cwd=here, capture_output=True, text=True)
    passed = re.search(r"(\d+) passed", ran.stdout)
    return Driver(int(passed[1]) if passed else 0, ran.returncode != 0, ran.stdout[-2000:])
