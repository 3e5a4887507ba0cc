"""What a benchmark's figures depend on, for its JSON."""

import json
import os
import platform
import subprocess
from pathlib import Path

import torch

from pipeline_ext.machine import processor


def describe() -> dict:
    """Commit, versions and machine."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return {
        "commit": commit.stdout.strip() or None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
    }


def write_results(name: str, **results: object) -> None:
    """Writes bench/results/NAME.json: the environment and what was found."""
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"environment": describe(), **results}, indent=2) + "\n")
    print(f"written to {path}")
