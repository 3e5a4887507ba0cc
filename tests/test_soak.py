"""The soak: a minute of it, and what it takes for a leak."""

import subprocess
import sys
from pathlib import Path

import pytest
from soak.slopes import HOUR, Sample, slopes, too_steep

TESTS = Path(__file__).parent


def samples(**growth):
    """Ten minutes in which these grow by so much in an hour, with one outlier and a warm-up."""
    made = []
    for second in range(0, 600, 5):
        values = {"memory": 300.0, "threads": 4, "descriptors": 10, "step": 1.0}
        for name, slope in growth.items():
            values[name] += slope * second / HOUR
        values["memory"] += 100 if second == 300 else 0
        values["memory"] -= max(0, 100 - second)
        made.append(Sample(time=second, **values))
    return made


def test_what_stays_flat_has_no_slope():
    assert slopes(samples()) == {"memory": 0, "threads": 0, "descriptors": 0, "step": 0}
    assert too_steep(samples()) == []


@pytest.mark.parametrize("name, slope", [("memory", 100), ("threads", 10), ("descriptors", 10), ("step", 10)])
def test_a_leak_is_named_with_its_slope(name, slope):
    assert slopes(samples(**{name: slope}))[name] == pytest.approx(slope)
    (said,) = too_steep(samples(**{name: slope}))
    assert said.startswith(f"{name} grows by {slope} in an hour; at most ")


@pytest.mark.every
def test_a_minute_of_the_soak():
    command = [sys.executable, "-m", "soak.run", "--minutes", "1", "--seed", "0"]
    ran = subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count(" 0 wrong") == 4
