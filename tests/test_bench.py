"""The benchmarks for GPUs, as far as they run without one."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["gpu_step", "gpu_host"])
def test_a_benchmark_for_gpus_runs_small_and_writes_nothing(name):
    if name == "gpu_step" and torch.__version__ < "2.12":
        pytest.skip("torch's own schedules of 2.11 send from a process to itself, which gloo cannot")
    before = sorted(ROOT.glob("bench/results/**/*"))
    run = [sys.executable, f"bench/{name}.py", "--smoke"]
    result = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "pipeline_ext" in result.stdout and "|---" in result.stdout  # its table as docs will have it
    assert sorted(ROOT.glob("bench/results/**/*")) == before


@pytest.mark.parametrize("failing", ["nothing", "pytest", "bench/gpu_host.py", "bench/tables.py"])
def test_make_gpu_goes_on_after_a_part_that_fails_and_fails_at_the_end(tmp_path, failing):
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in ("setup.py", "pyproject.toml", ".venv/installed-gpu", ".venv/bin/python"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    python = tmp_path / ".venv/bin/python"
    python.write_text(f'#!/bin/sh\necho "$@" >> ran\ncase "$*" in *{failing}*) exit 1; esac\n')
    python.chmod(0o755)
    made = subprocess.run(["make", "gpu"], cwd=tmp_path, capture_output=True, text=True)
    assert (made.returncode == 0) == (failing == "nothing"), made.stderr
    ran = (tmp_path / "ran").read_text()
    parts = ("bench/gpu_host.py", "bench/pack.py", "bench/gpu_step.py", "pytest -m gpu", "bench/tables.py")
    assert all(part in ran for part in parts)


def test_without_git_a_benchmark_tells_no_commit(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import environment

    monkeypatch.setenv("PATH", str(tmp_path))
    assert environment.describe()["commit"] is None


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import tables

    return tables


SPREAD = {"min": 1, "median": 2, "max": 3}


def test_the_table_of_steps_tells_aims_and_what_was_left_out(tables):
    row = {
        "size": "middle",
        "stages": 4,
        "step_ms": {"a": SPREAD},
        "peak_gib": {"a": 1.5, "b": 2.0},
        "left_out": {"b": "a kernel cannot be captured"},
        "ratios": [{"ours": "a", "other": "c", "faster_by": SPREAD, "aim": 1.05}],
    }
    lines = tables.gpu_step({"rows": [row]})
    assert "| middle | 4 | 1.0 / 2.0 / 3.0 (1.5) | left out: a kernel cannot be captured |" in lines
    assert "| middle | 4 | a | c | 1.00 / 2.00 / 3.00 | 1.05 |" in lines


def test_the_table_of_the_hosts_time_tells_nodes_and_why_there_are_none(tables):
    row = {"stages": 4, "layers": 8, "microbatches": 16, "nodes": 9000, "host_us": SPREAD, "aim_us": 50}
    graphs = [{**row, "fallback": None}, {**row, "fallback": "no graph", "aim_us": None}]
    lines = tables.gpu_host({"graphs": graphs, "eager": {"eager_step_us": SPREAD, "rows": []}})
    assert "| 4 | 8 | 16 | 9,000 | 1.0 / 2.0 / 3.0 | under 50 |" in lines
    assert "| 4 | 8 | 16 | none: no graph | 1.0 / 2.0 / 3.0 |  |" in lines


def test_figures_of_a_gpu_take_the_place_of_not_yet_run(tables, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables._figures("gpu_step") == ["GPU: not yet run."]
    (tmp_path / "nvidia-h200").mkdir()
    environment = {"commit": "c", "cores": 16, "processor": "p", "torch": "t"}
    environment |= {"device": "NVIDIA H200", "driver": "d", "triton": "3.6"}
    results = {"environment": environment, "rows": []}
    (tmp_path / "nvidia-h200" / "gpu_step.json").write_text(json.dumps(results))
    assert tables._figures("gpu_step")[-1].startswith("Commit c, NVIDIA H200, driver d, triton 3.6, torch t")
