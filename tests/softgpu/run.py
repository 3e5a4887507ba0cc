"""Runs the tests for GPUs on the software GPU, and looks whether they see what is broken on purpose.

    run.py [quick|all] [PYTEST ARGUMENTS]

``quick`` is for each change: about 15 minutes on two cores. ``all`` takes longer delays, of many seeds.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mutations import GPU, LATE, MUTANTS, SEEING, environment_of

HERE = Path(__file__).parent
SCHEDULES, MEMORY, CALLERS = (GPU / f"test_{name}_gpu.py" for name in ("schedules", "memory", "callers"))
PROCESSES = [GPU / "test_gpu_processes.py", GPU / "test_steps_of_processes.py"]
# Tests of the double that can run on the real torch.cuda, and how many devices they take.
DOUBLES = {"test_device_gradients.py": "2", "test_device_models.py": "1", "test_device_graphs.py": "1"}
DELAYS = {"quick": [(300, 1)], "all": [(1000, 1), (1000, 2), (4000, 3), (20000, 4)]}  # microseconds, seed
TESTS_FAILED = 1  # what pytest returns; of a broken command it returns more
FORGETTING = ["-p", "no:cacheprovider"]
SEEN = 0.95  # the share of mutants that has to be seen
JOBS = os.cpu_count() or 1
AT_ONCE = 3 * JOBS  # where tasks begin late, processes sleep most of the time


def main(arguments: Sequence[str]) -> int:
    part = arguments[0] if arguments and arguments[0] in DELAYS else "quick"
    rest = list(arguments[arguments[:1] == [part] :])
    began = time.monotonic()
    failed = []
    for label, files, environment in jobs(part):
        print(f"{label}", flush=True)
        if not _passes(files, environment, rest):
            failed.append(label)
    if not rest and not mutation(part):
        failed.append("broken engines that no test saw")
    minutes = (time.monotonic() - began) / 60
    print(
        f"the software GPU: {minutes:.1f} minutes; "
        + (f"failed: {', '.join(failed)}" if failed else "all passed")
    )
    return 1 if failed else 0


def jobs(part: str) -> list[tuple[str, list[Path], dict[str, str]]]:
    """What to run: a label, the files, and the environment."""
    varied = [SCHEDULES, MEMORY, CALLERS]
    others = [file for file in sorted(GPU.glob("test_*.py")) if file not in [*varied, *PROCESSES]]
    itself = [HERE / "test_software_gpu.py"]
    found = [("the software GPU", itself, {}), ("tests on GPUs", others, {})]
    found += [("processes over NCCL", PROCESSES, {"SOFTGPU_DEVICES": "4"})]
    plugin = {"PYTEST_PLUGINS": "on_real_torch", "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)])}
    for file, devices in DOUBLES.items():
        environment = {**plugin, "SOFTGPU_DEVICES": devices}
        found.append((f"{file} on the real torch.cuda", [HERE.parent / file], environment))
    for delay, seed in DELAYS[part]:
        late = {"SOFTGPU_DELAY_US": str(delay), "SOFTGPU_SEED": str(seed), "SOFTGPU_POISON": "1"}
        found.append((f"schedules, memory, callers: late by {delay} us, seed {seed}", varied, late))
    return found


def _passes(files: Sequence[Path], environment: Mapping[str, str], rest: Sequence[str]) -> bool:
    """Whether the job passes; what fails beside others, on a loaded machine, runs again by itself.

    Not where tasks begin late: a wrong number that comes once is what that job looks for.
    """
    late = "SOFTGPU_DELAY_US" in environment
    options = ["-n", str(AT_ONCE if late else JOBS), "--dist", "worksteal", *rest]
    if late:
        return pytest(files, [*FORGETTING, *options], environment).returncode == 0
    with tempfile.TemporaryDirectory(prefix="softgpu-") as cache:
        remembering = ["-o", f"cache_dir={cache}"]
        first = pytest(files, [*options, *remembering], environment)
        if first.returncode != TESTS_FAILED:
            return first.returncode == 0
        print("run again, one at a time:", flush=True)
        again = ["-n", "0", *rest, *remembering, "--last-failed", "--last-failed-no-failures", "none"]
        return pytest(files, again, environment).returncode == 0


def mutation(part: str) -> bool:
    """Breaks the engine in many ways, one at a time; says which share the tests see."""
    mutants = MUTANTS if part == "all" else MUTANTS[::3]
    print(f"{len(mutants)} broken engines, each of which a test has to see", flush=True)
    if _run_seeing(LATE).returncode != 0:
        print("the tests that have to see them fail on the engine as it is")
        return False
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = list(pool.map(_seen, mutants))
    missed = [mutant for mutant, seen in zip(mutants, results) if not seen]
    share = 1 - len(missed) / len(mutants)
    print(f"seen: {share:.0%} of {len(mutants)}" + "".join(f"\n  not seen: {mutant}" for mutant in missed))
    return share >= SEEN


def _seen(mutant: str) -> bool:
    return _run_seeing(environment_of(mutant)).returncode == TESTS_FAILED


def _run_seeing(environment: Mapping[str, str]) -> subprocess.CompletedProcess:
    return pytest([GPU / test for test in SEEING], [*FORGETTING, "-x"], environment, quiet=True)


def pytest(
    files: Sequence[Path], options: Sequence[str], environment: Mapping[str, str], quiet: bool = False
) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "-q", *options, *map(str, files)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=quiet)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
