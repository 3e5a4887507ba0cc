"""CUDA's number of queues is set before CUDA starts, or a warning says that it was not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

ROOT = Path(__file__).parent.parent.parent
EARLY = "import torch; torch.ones(1, device='cuda')\n"
TWICE = """
import torch
import pipeline_ext as pe
for _ in range(2):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    pe.Pipeline(model, 2, 2, loss_fn=torch.nn.functional.mse_loss, devices=["cuda:0"] * 2).close()
"""


def said(script, **environment):
    kept = {name: value for name, value in os.environ.items() if name != "CUDA_DEVICE_MAX_CONNECTIONS"}
    path = os.pathsep.join([str(ROOT), *filter(None, [kept.get("PYTHONPATH")])])
    ran = subprocess.run(
        [sys.executable, "-c", script],
        env={**kept, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stderr


def test_a_pipeline_warns_once_if_cuda_started_with_few_queues_and_the_advice_helps():
    warned = said(EARLY + TWICE)
    assert warned.count("start the program with CUDA_DEVICE_MAX_CONNECTIONS=32") == 1
    assert "CUDA_DEVICE" not in said(TWICE)  # pipeline_ext is imported first
    assert "CUDA_DEVICE" not in said(EARLY + TWICE, CUDA_DEVICE_MAX_CONNECTIONS="32")
