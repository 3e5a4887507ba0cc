"""The doctor command: what it shows, and what it says about what is missing."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.cli import main

DRIVER = """
extern "C" int cuInit(unsigned) { return STATUS; }
extern "C" int cuDriverGetVersion(int* version) { return *version = 13010, 0; }
"""


@pytest.fixture
def doctor(capsys):
    """Runs the command in this process; returns its exit status and its JSON object."""

    def call():
        status = main(["doctor", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


def capability(report, name):
    (found,) = (c for c in report["capabilities"] if c["name"] == name)
    return found


def test_one_screen_says_it_all():
    command = [sys.executable, "-m", "pipeline_ext", "doctor"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert len(lines) <= 24 and max(map(len, lines)) <= 100
    text = " ".join(shown.stdout.split())
    for part in (
        f"torch {torch.__version__}",
        f"{len(os.sched_getaffinity(0))} cores usable",
        "CUDA driver",
        "malloc",
        "CPU ranks available",
        "GPU ranks available" if torch.cuda.is_available() else "GPU ranks not available: there is no CUDA",
        "self-test gradients equal plain autograd",
    ):
        assert part in text, part


def test_the_same_as_json(doctor):
    status, report = doctor()
    assert status == 0 and report["self_test_failure"] is None
    machine = report["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["core"] == _C.__file__
    assert machine["intra_op_threads"] == torch.get_num_threads()
    missing = [c["name"] for c in report["capabilities"] if not c["available"]]
    on_gpus = [] if torch.cuda.is_available() else ["GPU ranks", "packing on a GPU"]
    assert missing == on_gpus
    assert capability(report, "many processes")["note"].startswith("over gloo, one rank each")


def test_a_network_that_cannot_connect_processes_is_told(doctor, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere")
    status, report = doctor()
    processes = capability(report, "many processes")
    assert status == 0 and not processes["available"]
    assert processes["note"].startswith("gloo cannot connect processes: ") and "nowhere" in processes["note"]


def test_without_matplotlib_it_says_what_to_install(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, report = doctor()
    pictures = capability(report, "pictures")
    assert status == 0 and not pictures["available"]
    assert pictures["note"] == "matplotlib is not installed; pip install 'pipeline_ext[plot]'"


def test_a_library_that_does_not_import_is_told_from_one_that_is_missing(doctor, monkeypatch, tmp_path):
    (tmp_path / "triton.py").write_text("raise RuntimeError('its wheel is for another machine')")
    (tmp_path / "cupy.py").write_text("import a_library_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    libraries = doctor()[1]["machine"]["libraries"]
    assert libraries["triton"]["problem"] == "does not import: its wheel is for another machine"
    assert libraries["cupy"]["problem"] == "is installed without a_library_nobody_has"


def test_a_missing_driver_is_named(doctor, monkeypatch, tmp_path):
    monkeypatch.setenv("PIPELINE_EXT_LIBCUDA", str(tmp_path / "libcuda.so"))
    status, report = doctor()
    driver = report["machine"]["cuda_driver"]
    assert status == 0 and driver["version"] is None
    assert str(tmp_path / "libcuda.so") in driver["problem"]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build a stand-in driver")
@pytest.mark.parametrize(
    "status, version, problem",
    [(0, "13.1", None), (100, None, "libcuda.so opens, but answers with CUDA error 100")],
)
def test_a_driver_is_asked_for_its_version(doctor, monkeypatch, tmp_path, status, version, problem):
    source, library = tmp_path / "driver.cpp", tmp_path / "libcuda.so"
    source.write_text(DRIVER)
    compile_it = ["g++", "-shared", "-fPIC", f"-DSTATUS={status}", source, "-o", library]
    subprocess.run(compile_it, check=True)
    monkeypatch.setenv("PIPELINE_EXT_LIBCUDA", str(library))
    machine = doctor()[1]["machine"]
    assert machine["cuda_library"] == str(library)
    assert machine["cuda_driver"]["version"] == version
    assert (machine["cuda_driver"]["problem"] or "").endswith(problem or "")


def test_a_malloc_set_by_the_environment_is_left_alone():
    shown = subprocess.run(
        [sys.executable, "-m", "pipeline_ext", "doctor"],
        env={**os.environ, "MALLOC_TOP_PAD_": "65536"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "left as your environment sets it: MALLOC_TOP_PAD_" in shown.stdout


@pytest.mark.parametrize("spoil", ["add to a gradient", "leave a gradient out", "raise"])
def test_wrong_training_ends_with_status_1(doctor, capsys, monkeypatch, spoil):
    step = pe.Pipeline.step

    def spoiled(pipe, *args, **kwargs):
        if spoil == "raise":
            raise pe.PipelineError("no rank answers\nand more")
        loss = step(pipe, *args, **kwargs)
        weight = next(p for stage in pipe._stages for p in stage.parameters())
        weight.grad = None if spoil == "leave a gradient out" else weight.grad + 1e-6
        return loss

    monkeypatch.setattr(pe.Pipeline, "step", spoiled)
    status, report = doctor()
    failure = report["self_test_failure"]
    if spoil == "raise":
        assert failure == "PipelineError: no rank answers"
    else:
        assert failure == "gradients differ from plain autograd: 0.weight"
    assert status == 1 and not capability(report, "CPU ranks")["available"]
    assert main(["doctor"]) == 1
    assert failure in capsys.readouterr().out
