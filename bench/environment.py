"""What a benchmark's figures depend on, for its JSON."""

import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

from pipeline_ext.cli.machine import processor


def describe(device: str = "cpu") -> dict:
    """Commit, versions and machine; with "cuda" also the GPU, its driver, and what runs kernels on it."""
    about = {
        "commit": _said_by("git", "describe", "--always", "--dirty", "--abbrev=12"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }
    if device == "cuda":
        about["device"] = torch.cuda.get_device_name()
        about["driver"] = _driver()
        about["cuda"] = torch.version.cuda
        about["triton"] = importlib.metadata.version("triton")
    return about


def write_results(name: str, device: str = "cpu", **results: object) -> None:
    """Writes the environment and what was found.

    To bench/results/NAME.json, or with "cuda" to bench/results/DEVICE/NAME.json.
    """
    about = describe(device)
    folder = Path(__file__).parent / "results"
    if "device" in about:
        folder /= re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"environment": about, **results}, indent=2) + "\n")
    print(f"written to {path}")


def _driver() -> str | None:
    """The version of NVIDIA's driver."""
    return _said_by("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _said_by(*command: str) -> str | None:
    """The first word that a command prints; None if it is not here or fails, as git does in a mere copy."""
    try:
        ran = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return next(iter(ran.stdout.split()), None)
