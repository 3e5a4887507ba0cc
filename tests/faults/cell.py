"""Runs a case in processes, and says what is not as it should be."""

import contextlib
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from processes import Failed, Gone, outcomes
from torch import Tensor

from .cases import Case, matches
from .namespaces import Nodes
from .program import HUNG, Join, Report, live

SLACK = 8.0  # seconds for the other cases that run at the same time
_TO_TELL = 3.0  # seconds before its end at which a process that hangs says where
_TO_END = 60.0  # seconds that processes take to start, to train and to close
_DISK = "4m"
_PORTS = (29500, 29501)  # of the store, in namespaces of their own: without and with the fault
_ATTEMPTS = 3


@dataclass
class Result:
    """What a case came to.

    Attributes:
        wrong: what is not as it should be, in sentences.
        seconds: from the fault to the last error of the others; None if they had none.
    """

    case: Case
    wrong: list[str]
    seconds: float | None
    came: bool = True  # the fault


def run_case(
    case: Case,
    begin: Path,
    right: list[dict[str, Tensor]],
    in_nodes: bool = True,
    body: Callable[..., Report] = live,
) -> Result:
    """Runs the case, then the training again from its checkpoint. ``begin``, ``right``: of ``plain_training``.

    On a busy machine a process may be late before the fault; the case is then run once more.
    """
    for _ in range(_ATTEMPTS):
        result = _run_once(case, begin, right, in_nodes, body)
        if result.came:
            break
    return result


def _run_once(
    case: Case, begin: Path, right: list[dict[str, Tensor]], in_nodes: bool, body: Callable[..., Report]
) -> Result:
    with contextlib.ExitStack() as stack:
        nodes = stack.enter_context(Nodes()) if in_nodes else None
        folder = stack.enter_context(_disk(case))
        shutil.copytree(begin, folder, dirs_exist_ok=True)
        names = None if nodes is None else tuple(nodes.names)
        expected = case.expected

        def processes(has_fault: bool, limit: float) -> list:
            join = Join(case, names, _free_port() if nodes is None else _PORTS[has_fault])
            telling = limit - _TO_TELL
            return outcomes(case.size, body, case, folder, has_fault, telling, timeout=limit, join=join)

        found = processes(True, expected.within + _TO_END)
        fired = folder / "fired"
        if not fired.exists():
            return Result(case, ["the fault never came", *map(_described, found)], None, came=False)
        at = float(fired.read_text())
        wrong, late = _judge(case, found, at, right)
        if wrong:
            wrong += _threads(folder)
        if any(getattr(each, "weights", None) is None for each in found):
            if nodes is not None:
                nodes.mend()
            wrong += [
                f"restarted, {text}" for text in _not_right(dict(enumerate(processes(False, _TO_END))), right)
            ]
        return Result(case, wrong, late)


@contextlib.contextmanager
def _disk(case: Case):
    """A folder; one on a small disk of its own, if that will be full."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        if case.fault != "disk full":
            yield Path(folder)
            return
        mount = ["mount", "-t", "tmpfs", "-o", f"size={_DISK}", "tmpfs", folder]
        subprocess.run(mount, check=True, capture_output=True)
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def _judge(
    case: Case, found: list, fired: float, right: list[dict[str, Tensor]]
) -> tuple[list[str], float | None]:
    expected = case.expected
    wrong = _compared(f"the victim, process {case.victim},", found[case.victim], expected.victim)
    others = {rank: outcome for rank, outcome in enumerate(found) if rank != case.victim}
    for rank, outcome in others.items():
        wrong += _compared(f"process {rank}", outcome, expected.others)
    errors = [o.errors[0] for o in others.values() if isinstance(o, Report) and o.errors]
    late = max((error.at - fired for error in errors), default=None)
    if late is not None and late > expected.within + SLACK:
        wrong.append(f"the others had their errors after {late:.1f} s, not {expected.within:g}")
    if expected.others and not any(
        matches(expected.says, outcome.errors[0].text)
        for outcome in found
        if isinstance(outcome, Report) and outcome.errors
    ):
        wrong.append(f"no error of the others says {expected.says!r}: {[error.text for error in errors]}")
    if expected.retried or not expected.others:
        well = [rank for rank, o in enumerate(found) if isinstance(o, Report) and _ends_well(o, expected)]
        wrong += _not_right({rank: found[rank] for rank in well}, right)
    for rank, outcome in enumerate(found):
        if isinstance(outcome, Report) and outcome.left:
            wrong.append(f"process {rank} has {outcome.left} gradients left of a step that failed")
        if isinstance(outcome, Report) and outcome.went_on and case.kills:
            wrong.append(f"process {rank} began another step with a pipeline that is dead")
    return wrong, late


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _threads(folder: Path) -> list[str]:
    """Where processes were that did not end."""
    files = sorted(folder.glob(f"{HUNG}*"))
    return [f"{file.name}: {text}" for file in files if (text := file.read_text().strip())]


def _ends_well(report: Report, expected) -> bool:
    return expected.retried or not report.errors


def _compared(who: str, outcome: object, kinds: tuple[str, ...]) -> list[str]:
    if isinstance(outcome, Report):
        raised = outcome.errors[0].kind if outcome.errors else None
        if (raised is None and not kinds) or (raised in kinds):
            return []
    elif isinstance(outcome, Gone) and "gone" in kinds:
        return []
    return [f"{who} should have had {' or '.join(kinds) or 'no error'}, and {_described(outcome)}"]


def _described(outcome: object) -> str:
    if isinstance(outcome, Failed):
        return f"raised {outcome.traceback}"
    if isinstance(outcome, Gone):
        return outcome.why
    assert isinstance(outcome, Report)
    if not outcome.errors:
        return "had no error"
    return "had " + ", then ".join(f"{error.kind}: {error.text}" for error in outcome.errors)


def _not_right(found: dict[int, object], right: list[dict[str, Tensor]]) -> list[str]:
    """What is wrong with processes that should have trained to the end."""
    wrong = []
    for rank, outcome in found.items():
        if not isinstance(outcome, Report) or outcome.weights is None:
            wrong.append(f"process {rank} has no weights: {_described(outcome)}")
        elif not _equal(outcome.weights, right[rank % len(right)]):
            wrong.append(f"process {rank} has wrong weights")
    return wrong


def _equal(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return all(torch.equal(weights[name], expected[name]) for name in expected)
