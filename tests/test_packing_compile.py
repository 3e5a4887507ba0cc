"""What the packing kernels become on GPUs: compiled ahead of time, which needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

SCRIPT = Path(__file__).with_name("compile_packing.py")


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """What each case became on each architecture; ``pytest -rP`` shows the registers."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
    }
    result = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def named(record):
    return f"sm_{record['architecture']} {record['case']}"


def wide(record, instruction):
    """How many accesses of 128 bits there are."""
    return len(re.findall(rf"\b{instruction}\.global\S*\.(?:v4\.b32|v2\.b64)", record["ptx"]))


def test_every_architecture_compiles_every_case(records):
    assert {record["architecture"] for record in records} == {80, 90, 100}
    assert len({named(record) for record in records}) == len(records) >= 30


def test_whole_blocks_move_by_accesses_of_128_bits(records):
    """A thread's share of a block is 16 elements, so as many accesses as an element has bytes.

    What is copied as words of four bytes has four accesses more for these.
    """
    for record in records:
        tensor, wire = (sum(sizes) + 4 * record["words"] for sizes in zip(*record["pairs"]))
        loads, stores = (tensor, wire) if record["case"].startswith("pack") else (wire, tensor)
        if record["accumulated"]:
            loads += tensor
        assert (wide(record, "ld"), wide(record, "st")) == (loads, stores), named(record)


def test_no_registers_spill(records):
    """But for two: the assembler of Triton 3.8 gives them a frame of 8 bytes rather than more than 48."""
    for record in records:
        print(f"{named(record)}: {record['registers']} registers")
        allowed = 8 if record["case"] in ("pack mixed", "pack u8") and record["registers"] <= 48 else 0
        assert record["local"] <= allowed and ".local" not in record["ptx"], named(record)


def test_registers_leave_room_for_three_programs(records):
    """Of 256 threads, on a multiprocessor with 65536 registers; fewer could not hide the memory's latency."""
    for record in records:
        assert record["registers"] <= 80, named(record)


def test_arithmetic_is_neither_fused_nor_flushed(records):
    """As on the CPU: a product is rounded before it is added, and subnormal numbers count."""
    for record in records:
        assert not re.search(r"\bfma\.|\.ftz\b", record["ptx"]), named(record)
