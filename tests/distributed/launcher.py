"""``pipeline-ext train`` in the processes that a real torchrun starts on this machine."""

import os
import subprocess
import sys
from pathlib import Path

TIMEOUT = 120.0  # seconds, of a run with a restart: torch is imported in each process anew
SMALL = "--batch 8 --context 16 --width 16 --heads 2 --microbatches 4 --threads 1".split()
DYING = Path(__file__).with_name("dying_train.py")


def command(size: int, *args: object, restarts: int = 0, dies_in: int | None = None) -> list[str]:
    """``size`` processes; with ``dies_in`` one kills itself in that step, unless it has been started again."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
    torchrun += [f"--max-restarts={restarts}", "--monitor-interval=0.1"]
    program = ["-m", "pipeline_ext"] if dies_in is None else [DYING, dies_in]
    return [str(part) for part in (*torchrun, *program, "train", *args)]


def environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, sys.path))
    return {**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


def torchrun(size: int, *args: object, cwd: Path, **options: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(size, *args, **options),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
