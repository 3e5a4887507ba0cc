"""Calls every entry point with hostile input for some time; names the crashes, the hangs and the wrong errors.

In ``tests``: ``python -m hostile.run --seconds 60``; ``--only NAME --seed N`` runs one case in this process.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import torch
from core_builds import MODES, RANDOM_PLANS, build
from standin_driver import build_standin

from . import native, texts
from .children import run_one, survey


def main() -> int:
    """Exit status 1 if there is a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=10.0, help="for the entry points, and for each core")
    parser.add_argument("--seed", type=int, help="of the first cases; the time if not given")
    parser.add_argument("--core", action="append", default=[], choices=MODES, help="also the core, so built")
    parser.add_argument("--plans", type=int, default=1_000_000, help="at most so many plans of the core")
    parser.add_argument("--only", help="run this subject's case of that seed alone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["PIPELINE_EXT_LIBCUDA"] = str(build_standin())
    subjects = [*native.subjects(), *texts.subjects()]
    if options.only is not None:
        (subject,) = [subject for subject in subjects if subject.name == options.only]
        print(run_one(subject, options.seed))
        return 0
    os.chdir(tempfile.mkdtemp(prefix="hostile-"))  # some write files
    seed = time.time_ns() if options.seed is None else options.seed
    failed = [mode for mode in options.core if not _plans_pass(mode, options.plans, options.seconds, seed)]
    found = survey(subjects, options.seconds, seed)
    for (subject, kind), what in sorted(found.faults.items()):
        print(f"FAULT {subject}: {kind}: {what}")
    cases, returned = found.cases.total(), found.returned.total()
    print(
        f"{cases} cases of {len(found.cases)} subjects, {returned} of them accepted; {len(found.faults)} faults"
    )
    never = sorted(subject.name for subject in subjects if not found.returned[subject.name])
    print(f"never accepted: {', '.join(never) or 'none'}")
    return bool(found.faults or failed)


def _plans_pass(mode: str, count: int, seconds: float, seed: int) -> bool:
    """Whether random plans pass through the C++ core, built with a sanitizer; prints what it says."""
    program = build("random plans", [RANDOM_PLANS], mode)
    ran = subprocess.run([program, str(count), str(seconds), str(seed)], capture_output=True, text=True)
    print(f"{'' if ran.returncode == 0 else 'FAULT '}the core, {mode}: {ran.stdout}{ran.stderr}", end="")
    return ran.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
