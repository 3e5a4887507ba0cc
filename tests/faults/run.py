"""Injects every fault at every moment of a training; names the cases that end in another way than documented.

In ``tests``: ``python -m faults.run``; ``--only "killed: save"`` runs the cases whose names hold that.
"""

import argparse
import os
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # of connections that end, of which there are many

import torch

from . import driver, namespaces, report
from .cases import NEEDS_RIGHTS, Case, cases, short
from .cell import Result, run_case
from .program import plain_training


def main() -> int:
    """Exit status 1 if a case ends in another way than documented."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--short", action="store_true", help="one case of each fault")
    parser.add_argument("--only", help="the cases whose names hold this text")
    parser.add_argument("--jobs", type=int, default=4, help="cases at a time; most of them wait")
    parser.add_argument("--write", action="store_true", help="write the counts to docs/reliability.md")
    options = parser.parse_args()
    if before := namespaces.as_root():
        os.execvp(before[0], [*before, sys.executable, "-m", "faults.run", *sys.argv[1:]])
    torch.set_num_threads(1)
    chosen = [case for case in (short() if options.short else cases()) if (options.only or "") in case.name]
    began = time.monotonic()
    results, left_out = run([case for case in chosen if case.why_not is None], options.jobs)
    wrong = [result for result in results if result.wrong]
    of_driver = None if options.short or options.only else driver.run()
    if of_driver is not None and of_driver.failed:
        print(f"FAULT each driver call failing: {of_driver.said}")
    for case, why in left_out:
        print(f"left out: {case.name}: {why}")
    minutes = (time.monotonic() - began) / 60
    print(f"{len(results)} cases, {len(wrong)} wrong, {len(left_out)} left out; {minutes:.1f} minutes")
    if options.write and not wrong and not left_out and of_driver is not None:
        report.write(results, [case for case in chosen if case.why_not is not None], of_driver)
    return bool(wrong or (of_driver is not None and of_driver.failed))


def run(chosen: list[Case], jobs: int) -> tuple[list[Result], list[tuple[Case, str]]]:
    """What these cases came to, and those that cannot run on this machine, with the reason."""
    missing = namespaces.why_not()
    left_out = [(case, missing) for case in chosen if missing is not None and case.fault in NEEDS_RIGHTS]
    here = [case for case in chosen if missing is None or case.fault not in NEEDS_RIGHTS]
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ThreadPoolExecutor(jobs) as pool:
        begin = Path(folder)
        right = plain_training(begin)

        done: list[Result] = []

        def one(case: Case) -> Result:
            result = run_case(case, begin, right, missing is None)
            for text in result.wrong:
                print(f"FAULT {case.name}: {text}", flush=True)
            done.append(result)
            if len(done) % 50 == 0:
                print(f"{len(done)} of {len(here)} cases", flush=True)
            return result

        list(pool.map(one, here))
        return done, left_out


if __name__ == "__main__":
    sys.exit(main())
