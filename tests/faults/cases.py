"""The table of faults and moments: what is injected where, and what docs/failure.md says comes of it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

_LIMIT = 5.0  # seconds: the pipeline's timeout, where that ends the wait
_PATIENT = 20.0  # where something else must end the wait, and at once
_GENTLE = 30.0  # where nothing may end it
GRACE = 2.0  # seconds beside the timeout that docs/failure.md grants

_NON_FINITE = "non-finite"

# By name: the function of injection.py.
FAULTS = {
    "exception": "complain",
    "hang": "hang",
    "out of memory": "run_out_of_memory",
    "wrong shape": "spoil_shape",
    _NON_FINITE: "spoil_number",
    "killed": "kill",
    "stopped": "stop",
    "cut off for 5 s": "cut_off_a_while",
    "cut off for good": "cut_off",
    "half-open": "vanish",
    "slow link": "slow_link",
    "disk full": "fill_disk",
    "Ctrl-C": "interrupt",
}
NEEDS_RIGHTS = {"cut off for 5 s", "cut off for good", "half-open", "slow link", "disk full"}

# By name: the moment that program.py reaches, how often until the fault, and the schedule.
_STEP = {
    "first step": ("first step F", 2, "1f1b"),
    "F": ("step F", 2, "1f1b"),
    "B": ("step B", 2, "1f1b"),
    "I": ("step B", 2, "zb-h1"),
    "W": ("step W", 2, "zb-h1"),
    "reduction": ("step B", 4, "1f1b"),
    "eval": ("eval F", 2, "1f1b"),
}
_BETWEEN = {name: (name, 1, "1f1b") for name in "construct clip save load gather_trace close exit".split()}
_MOMENTS = {**_STEP, **_BETWEEN}
MOMENTS = "construct,first step,F,B,I,W,reduction,eval,clip,save,load,gather_trace,close,exit".split(",")
_CHECKPOINT = ("save", "load")
_END = ("close", "exit")

_SPLIT = 2  # stages
_GONE = "gone"  # in place of an error, for a process that has no end of its own


@dataclass(frozen=True)
class Expected:
    """What must come of a case.

    Attributes:
        victim, others: the errors of which each has one; empty: none, and the weights are right.
        says: what is in the error of the others; of several processes, in that of one at least.
        within: seconds from the fault to these errors, on a quiet machine.
        timeout: what the pipeline is given.
        retried: the call fails in all processes, and the next one works.
    """

    victim: tuple[str, ...]
    others: tuple[str, ...]
    says: str
    within: float
    timeout: float
    retried: bool = False


@dataclass(frozen=True)
class Case:
    """A cell of the table.

    Attributes:
        victim: the process with the fault; its stage is the remainder by 2.
        host: the process with the store of torch.distributed.
    """

    fault: str
    moment: str
    victim: int
    host: int

    @property
    def name(self) -> str:
        host = "the store's host" if self.host == self.victim else "not the store's host"
        return f"{self.fault}: {self.moment}, stage {self.stage}, {host}"

    @property
    def stage(self) -> int:
        return self.victim % _SPLIT

    @property
    def size(self) -> int:
        """The number of processes; two replicas reduce."""
        return 4 if self.moment == "reduction" else 2

    @property
    def fault_function(self) -> str:
        return FAULTS[self.fault]

    @property
    def reached(self) -> str:
        return _MOMENTS[self.moment][0]

    @property
    def times(self) -> int:
        return _MOMENTS[self.moment][1]

    @property
    def schedule(self) -> str:
        return _MOMENTS[self.moment][2]

    @property
    def nonfinite(self) -> str | None:
        """What the pipeline is given."""
        return "raise" if self.fault == _NON_FINITE else None

    @property
    def kills(self) -> bool:
        """Whether a pipeline takes no other step after an error there; a checkpoint leaves it alive."""
        return self.moment not in _CHECKPOINT

    def mesh(self) -> Any:
        """Of the pipeline, in each process."""
        if self.size == 2:
            return dist.group.WORLD
        return init_device_mesh("cpu", (self.size // _SPLIT, _SPLIT), mesh_dim_names=("dp", "pp"))

    @property
    def expected(self) -> Expected:
        return _expected(self)

    @property
    def why_not(self) -> str | None:
        """Why there is no such case; None if there is."""
        if self.fault == "wrong shape" and self.moment not in ("construct", "first step", *"FBIW", "eval"):
            return "nothing that has a shape of its own is passed on"
        if self.fault == "wrong shape" and self.moment == "eval" and self.stage == _SPLIT - 1:
            return "the result of the last stage may have any shape"
        if self.fault == _NON_FINITE and self.moment not in ("first step", *"FBIW", "reduction"):
            return "no loss and no gradient is computed"
        if self.fault == "disk full" and self.moment != "save":
            return "nothing is written"
        return None


def cases() -> Iterator[Case]:
    """All cells, by fault and moment, also those that cannot be."""
    for fault in FAULTS:
        for moment in MOMENTS:
            for victim in range(_SPLIT):
                for host in range(_SPLIT):
                    yield Case(fault, moment, victim, host)


def _expected(case: Case) -> Expected:
    fault, moment = case.fault, case.moment
    if fault in ("cut off for 5 s", "slow link"):
        return Expected((), (), "", _GENTLE, _GENTLE)
    if fault == _NON_FINITE:
        kinds = ("NonFiniteError",)
        return Expected(kinds, kinds, "is not finite", GRACE, _PATIENT, retried=True)
    if moment in _END:
        return Expected(_own_error(case), (), "", _PATIENT, _LIMIT)
    found = _in_step(case) if moment in _STEP else _between(case)
    if moment == "reduction":
        # Some may have the whole step, and hear of the failure in the next call.
        kinds = {*found.others, "ReductionError", "PeerError", "DeadPipeline"}
        return replace(found, others=tuple(kinds), says=_named(case))
    return found


def _own_error(case: Case) -> tuple[str, ...]:
    """The error of the process itself, where nothing of the engine is between."""
    return {
        "exception": ("ValueError",),
        "out of memory": ("RuntimeError",),
        "Ctrl-C": ("KeyboardInterrupt",),
        "cut off for good": (),
    }.get(case.fault, (_GONE,))


def _named(case: Case) -> str:
    """How the others say who it was; without the store they may know that only."""
    name = rf"process {case.victim}\b"
    return f"{name}|store of torch.distributed" if case.host == case.victim else name


_LATE = ("PeerError", "StepTimeout")


def _in_step(case: Case) -> Expected:
    at_once = {"within": GRACE, "timeout": _PATIENT}
    in_time = {"within": _LIMIT + GRACE, "timeout": _LIMIT}
    told = rf"process {case.victim}\b\)? failed"
    return {
        "exception": Expected(("StageError",), ("PeerError",), f"{told}.*poisoned", **at_once),
        "out of memory": Expected(("StageError",), ("PeerError",), f"{told}.*allocate memory", **at_once),
        # Another stage may be the one that cannot take it.
        "wrong shape": Expected(
            ("StageError", "PeerError"), ("StageError", "PeerError"), "RuntimeError", **at_once
        ),
        "hang": Expected(("StepTimeout", "PeerError"), _LATE, _named(case), **in_time),
        "killed": Expected((_GONE,), ("PeerError",), _named(case), **at_once),
        "stopped": Expected((_GONE,), _LATE, _named(case), **in_time),
        "cut off for good": Expected(_LATE, _LATE, _named(case), **in_time),
        "half-open": Expected((_GONE,), _LATE, _named(case), **in_time),
        "Ctrl-C": Expected(("KeyboardInterrupt",), ("PeerError",), f"{told}.*KeyboardInterrupt", **at_once),
    }[case.fault]


def _between(case: Case) -> Expected:
    """Outside of steps a process that raises, and ends, is gone."""
    fault, moment = case.fault, case.moment
    at_once = {"within": GRACE, "timeout": _PATIENT}
    in_time = {"within": _LIMIT + GRACE, "timeout": _LIMIT}
    if fault == "wrong shape":  # a stage is made with it: the checkpoint does not fit
        return Expected(("InvalidArgument",), ("InvalidArgument",), "weight", **at_once)
    if moment in _CHECKPOINT and fault in ("exception", "out of memory", "disk full"):
        text = {"exception": "poisoned", "out of memory": "allocate memory", "disk full": "no space left"}
        kinds = ("PipelineError",)
        return Expected(kinds, kinds, text[fault], **at_once, retried=True)
    ends = fault in ("exception", "out of memory", "killed", "Ctrl-C")
    # Processes that are not connected yet cannot notice that one is gone.
    limits = at_once if ends and moment != "construct" else in_time
    victim = _LATE if fault == "cut off for good" else _own_error(case)
    return Expected(victim, _LATE, _named(case), **limits)


def short() -> Iterator[Case]:
    """One case of each fault, for the test suite."""
    moments = {"stopped": "construct", "disk full": "save", "killed": "clip", "Ctrl-C": "eval", "hang": "W"}
    for number, fault in enumerate(FAULTS):
        yield Case(fault, moments.get(fault, "F"), number % _SPLIT, number // 2 % _SPLIT)


def matches(pattern: str, text: str) -> bool:
    return re.search(pattern, text, re.S) is not None
