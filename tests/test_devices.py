"""Which devices a pipeline takes, and what is said where one cannot be used."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from device_double import install
from torch import nn

import pipeline_ext as pe
from pipeline_ext.engines.devices import of_process

TRAIN = """
import torch
import pipeline_ext as pe
model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
x = torch.randn(4, 2)
with pe.Pipeline(model, 2, 2, loss_fn=torch.nn.functional.mse_loss) as pipe:
    print(float(pipe.step(x, target=x)) > 0, pipe.devices[0].type)
"""
ON_A_GPU = """
import pipeline_ext as pe
SETUP
try:
    pe._C.num_devices()
except pe.DeviceError as error:
    print(error)
"""


def python(code, **environment):
    command = [sys.executable, "-c", code]
    ran = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("library", ["/nowhere/libcuda.so.1", __file__])
def test_without_a_driver_pipelines_run_on_the_cpu(library):
    environment = {"PIPELINE_EXT_LIBCUDA": library, "CUDA_VISIBLE_DEVICES": ""}
    assert python(TRAIN, **environment) == "True cpu"
    said = python(ON_A_GPU.replace("SETUP", ""), **environment)
    assert said.startswith("there is no CUDA driver:") and library in said


@pytest.mark.parametrize("local_rank, expected", [("0", 0), ("1", 1), ("3", 1), (None, 0)])
def test_a_process_takes_the_gpu_of_its_local_rank_among_those_it_sees(gpus, monkeypatch, local_rank, expected):
    if local_rank is None:
        monkeypatch.delenv("LOCAL_RANK", raising=False)
    else:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    with_gpus, without = (SimpleNamespace(have_gpus=have, size=4, replicas=None) for have in (True, False))
    assert of_process(None, with_gpus) == [f"cuda:{expected}"] * 4
    assert of_process(None, without) == ["cpu"] * 4
    assert of_process(["cuda:1"], without) == ["cuda:1"] * 4


SCRIPT = "import ctypes, os; standin = ctypes.CDLL(os.environ['PIPELINE_EXT_LIBCUDA'])"


@pytest.mark.parametrize(
    "setup, expected",
    [
        ("standin.standin_set_version(11080)", "is a driver for CUDA 11.8"),
        ("standin.standin_hide(b'cuStreamGetCaptureInfo')", "has no cuStreamGetCaptureInfo"),
    ],
)
def test_a_driver_that_is_too_old_is_told_with_the_version_it_takes(standin_library, setup, expected):
    code = ON_A_GPU.replace("SETUP", f"{SCRIPT}; {setup}")
    said = python(code, PIPELINE_EXT_LIBCUDA=str(standin_library))
    assert expected in said
    assert "needs one for CUDA 12.0 or newer (driver 525 or newer): update the NVIDIA driver" in said


def test_a_driver_without_devices(standin_library):
    code = ON_A_GPU.replace("SETUP", f"{SCRIPT}; standin.standin_reset(0)")
    said = python(code, PIPELINE_EXT_LIBCUDA=str(standin_library))
    assert "cannot be used: cuInit failed: CUDA_ERROR_NO_DEVICE (100)" in said


def test_a_script_that_asks_for_graphs_runs_without_a_gpu():
    options = "graphs=True, optimizer=torch.optim.Adam(model.parameters()), "
    said = python(TRAIN.replace("loss_fn=", f"{options}loss_fn="), CUDA_VISIBLE_DEVICES="")
    assert said.splitlines() == [
        "graphs=True: steps run eagerly because the ranks are on the CPU", "True cpu"
    ]  # fmt: skip


def make(**options):
    return pe.Pipeline(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), 2, 2, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a GPU")
def test_a_gpu_that_torch_does_not_see_is_refused(standin):
    assert pe._C.num_devices() > 0
    with pytest.raises(pe.DeviceError, match="devices holds a GPU, which the driver sees and torch does not"):
        make(devices=["cuda:0"] * 2)


@pytest.mark.parametrize(
    "devices, message",
    [
        (["cuda:0", "cpu"], "devices holds cpu and cuda; give all ranks devices of one type"),
        (["cuda:0", "cuda:2"], "devices holds 'cuda:2', and torch sees 2 of them: cuda:0 to cuda:1"),
        (["cuda:0", "gpu"], "devices holds 'gpu', which is no device"),
        (["meta"] * 2, "devices holds 'meta'; ranks run on CPUs and on CUDA devices"),
        ("cuda:0", "devices is 'cuda:0'; give a list with one entry for each rank"),
        ([], r"devices is \[\]; give a list"),
        (["cuda:0"], "the number of ranks|1f1b"),
    ],
    ids=str,
)
def test_devices_that_cannot_be_used_are_refused(gpus, devices, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        make(devices=devices)


def test_what_streams_do_not_do_is_refused(gpus):
    with pytest.raises(pe.InvalidArgument, match="each has a clock of its own; give a number"):
        make(pack="auto")
    with pytest.raises(pe.InvalidArgument, match="the host runs ahead of GPUs; leave it out"):
        make(reduction=pe.GradientReduction(pe.LocalGroup(1).member(0)))


def test_parameters_tied_across_devices_are_refused_before_anything_moves(gpus, monkeypatch):
    from pipeline_ext.engines.cuda import torch_side

    moved = []
    monkeypatch.setattr(torch_side, "move_module", lambda module, device: moved.append(module))
    first, last = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    last.weight = first.weight
    with pytest.raises(pe.InvalidArgument, match="stages on cuda:0 and cuda:1 share '(0.)?weight'"):
        pe.Pipeline([first, last], microbatches=2, devices=["cuda:0", "cuda:1"])
    assert not moved
    pe.Pipeline([first, last], microbatches=2, devices=["cuda:1", "cuda:1"]).close()
    assert len(moved) == 2


def test_a_gpu_without_a_number_is_the_current_one(standin, monkeypatch):
    double = install(monkeypatch, standin)
    double.device = 1
    with make(devices=["cuda"] * 2) as pipe:
        assert pipe.devices == [torch.device("cuda", 1)] * 2
