"""Runs cases in forked children, so that a crash, a hang or too much memory is a fault with a name."""

import contextlib
import faulthandler
import mmap
import os
import random
import resource
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

MOST_BYTES = 2 << 30  # of memory that a case may take
_BATCH = 400  # cases of a child, whose garbage ends with it
_PATIENCE = 20.0  # seconds without progress; the machine may be busy
_MARK = struct.Struct("qq")  # the case that a child runs


@dataclass(frozen=True)
class Subject:
    """What is called: ``call`` draws its arguments from the random numbers it is given."""

    name: str
    call: Callable[[random.Random], object]
    allowed: tuple[type[BaseException], ...]  # that it may raise


@dataclass
class Survey:
    """What came of the cases.

    Attributes:
        cases: how often each subject was called.
        returned: how often it raised nothing.
        faults: what was seen first of each fault, by subject and kind.
    """

    cases: Counter = field(default_factory=Counter)
    returned: Counter = field(default_factory=Counter)
    faults: dict[tuple[str, str], str] = field(default_factory=dict)

    def note(self, subject: str, kind: str, what: str) -> None:
        self.faults.setdefault((subject, kind), what)


def run_one(subject: Subject, seed: int) -> object:
    """One case, in this process."""
    return subject.call(random.Random(f"{subject.name} {seed}"))


def survey(subjects: Sequence[Subject], seconds: float, seed: int) -> Survey:
    """Calls the subjects in turn until the time is over, each at least once."""
    found = Survey()
    cases = _cases(subjects, seed)
    end = time.monotonic() + seconds
    done = 0
    with tempfile.TemporaryFile() as crash:
        while time.monotonic() < end or done < len(subjects):
            done += _run_child(subjects, [next(cases) for _ in range(_BATCH)], crash, found)
    return found


def _cases(subjects: Sequence[Subject], seed: int) -> Iterator[tuple[int, int]]:
    while True:
        for index in range(len(subjects)):
            yield index, seed
        seed += 1


def _run_child(
    subjects: Sequence[Subject], batch: list[tuple[int, int]], crash: IO[bytes], found: Survey
) -> int:
    """Forks a child for these cases; returns how many it ran. ``crash`` is for what it writes if it dies."""
    crash.seek(0)
    crash.truncate()
    mark = mmap.mmap(-1, _MARK.size)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read)
        faulthandler.enable(crash)
        _child(subjects, batch, mark, write)
    os.close(write)
    said = bytearray()
    os.set_blocking(read, False)
    seen, since, hung = (0, 0), time.monotonic(), False
    while True:
        with contextlib.suppress(BlockingIOError):
            while part := os.read(read, 1 << 16):
                said += part
        gone, status = os.waitpid(pid, os.WNOHANG)
        if gone:
            break
        now = _MARK.unpack(mark[:])
        if now != seen:
            seen, since = now, time.monotonic()
        elif time.monotonic() - since > _PATIENCE:
            os.kill(pid, signal.SIGKILL)
            hung = True
        time.sleep(0.005)
    with contextlib.suppress(BlockingIOError):
        while part := os.read(read, 1 << 16):
            said += part
    os.close(read)
    count, _ = _MARK.unpack(mark[:])
    for line in said.decode(errors="replace").splitlines():
        outcome, index, case, kind, what = line.split("\t", 4)
        subject = subjects[int(index)].name
        found.cases[subject] += 1
        if outcome == "returned":
            found.returned[subject] += 1
        elif outcome == "fault":
            found.note(subject, kind, f"seed {case}: {what}")
    if os.WIFSIGNALED(status) and count < len(batch):
        index, case = batch[count]
        kind = f"no end in {_PATIENCE:g} s" if hung else signal.Signals(os.WTERMSIG(status)).name
        found.cases[subjects[index].name] += 1
        crash.seek(0)
        threads = " ".join(crash.read(1000).decode(errors="replace").split())
        found.note(subjects[index].name, kind, f"seed {case}: {threads}")
        count += 1
    return count


def _described(error: BaseException) -> str:
    """What was raised, and where; the frames of this folder do not matter."""
    frames = traceback.extract_tb(error.__traceback__)
    *_, last = [f for f in frames if "pipeline_ext/" in f.filename] or frames
    return f"{str(error)[:300]} ({Path(last.filename).name}:{last.lineno}, in {last.name})"


def _child(subjects: Sequence[Subject], batch: list[tuple[int, int]], mark: mmap.mmap, write: int) -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MOST_BYTES, 2 * MOST_BYTES))  # of a case that never stops
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    with os.fdopen(write, "w", buffering=1, errors="replace") as out:
        for count, (index, seed) in enumerate(batch):
            mark[:] = _MARK.pack(count, seed)
            outcome, kind, what = "refused", "", ""
            try:
                run_one(subjects[index], seed)
                outcome = "returned"
            except subjects[index].allowed:
                pass
            except BaseException as error:
                outcome, kind, what = "fault", type(error).__name__, _described(error)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > MOST_BYTES >> 10:
                outcome, kind, what = "fault", "memory", f"more than {MOST_BYTES >> 30} GiB"
            out.write(f"{outcome}\t{index}\t{seed}\t{kind}\t{' '.join(what.split())}\n")
            if kind == "memory":
                break  # the most that was ever taken does not fall again
        mark[:] = _MARK.pack(count + 1, 0)
    sys.stdout = sys.stderr = None
    os._exit(0)
