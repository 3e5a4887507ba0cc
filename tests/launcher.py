"""Programs in the processes that a real torchrun starts on this machine."""

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 300.0  # seconds, of a run with a restart: each process imports torch anew, beside other tests
SMALL = "--batch 8 --context 16 --width 16 --heads 2 --microbatches 4 --threads 1".split()
DYING = Path(__file__).parent / "distributed" / "dying_train.py"


def train(*args: object, dies_in: int | None = None) -> list[object]:
    """The command; with ``dies_in`` process 1 kills itself in that step, unless it has been started again."""
    program = ["-m", "pipeline_ext"] if dies_in is None else [DYING, dies_in]
    return [*program, "train", *args]


def command(size: int, program: list[object], restarts: int = 0) -> list[str]:
    """That starts ``size`` processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--monitor-interval=0.1"]
    torchrun += [f"--nproc-per-node={size}", f"--max-restarts={restarts}"]
    return [*torchrun, *map(str, program)]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def torchrun(
    size: int, program: list[object], cwd: Path, restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    """Runs it to its end."""
    return subprocess.run(
        command(size, program, restarts),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
