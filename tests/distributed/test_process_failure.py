"""One process of a pipeline is killed, stopped or raises in the middle of a step: others end and say why."""

import os
import re
import subprocess
import sys
import time
import unittest.mock
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import Gone, die, freeze, outcomes, run
from torch import nn

import pipeline_ext as pe

MICROBATCHES = 4


class Counted(nn.Linear):
    """A stage that says when it is in the second step; in microbatch 1 of that step it does ``fault``, if any.

    The fault waits until every stage is there: a process that hears of a failure before its step is refused it
    (DeadPipeline), and its gradients stay.
    """

    def __init__(self, fault=None):
        super().__init__(4, 4)
        self.fault, self.forwards = fault, 0
        self.store = dist.distributed_c10d._get_default_store().clone()

    def forward(self, x):
        self.forwards += 1
        if self.forwards == MICROBATCHES + 1:
            self.store.add("in the second step", 1)
        elif self.forwards == MICROBATCHES + 2 and self.fault is not None:
            while self.store.add("in the second step", 0) < dist.get_world_size():
                time.sleep(0.01)
            self.fault()
        return super().forward(x)


def complain():
    raise ValueError("poisoned")


def two_steps(victim, fault, timeout):
    """A pipeline of one stage for each process, and what its second step raised."""
    stages = [Counted(fault if rank == victim else None) for rank in range(dist.get_world_size())]
    pipe = pe.Pipeline(stages, None, MICROBATCHES, "1f1b", F.mse_loss, mesh=dist.group.WORLD, timeout=timeout)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    pipe.step(x, target=y)
    with pytest.raises(pe.PipelineError) as failed:
        pipe.step(x, target=y)
    return pipe, failed.value, (x, y)


def fail(victim, fault, timeout):
    pipe, error, (x, y) = two_steps(victim, fault, timeout)
    assert all(p.grad is None for module in pipe.stage_modules for p in module.parameters())
    for again in (lambda: pipe.step(x, target=y), lambda: pipe.eval(x)):
        with pytest.raises(pe.DeadPipeline, match="it failed in one of its processes"):
            again()
    pipe.close()
    return type(error), str(error)


@pytest.mark.parametrize("fault", [complain, die, freeze])
@pytest.mark.parametrize("size, victim", [(2, 1), (3, 0), (3, 1), (3, 2)])
def test_every_other_process_names_the_one_that_failed_and_what_was_waited_for(size, victim, fault):
    # A process that is gone is found by its connections; only one that is stopped takes the pipeline's time.
    found = outcomes(size, fail, victim, fault, 3 if fault is freeze else 300, timeout=50)
    of_victim = found.pop(victim)
    if fault is complain:
        kind, text = of_victim
        assert kind is pe.StageError and "raised ValueError: poisoned" in text
    else:
        assert isinstance(of_victim, Gone)
    for outcome in found:
        assert isinstance(outcome, tuple), outcome
        kind, text = outcome
        assert kind in ((pe.PeerError, pe.StepTimeout) if fault is freeze else (pe.PeerError,))
        assert f"process {victim}" in text
        assert re.search(
            r"the (activations|gradients) of microbatch \d across boundary \d from rank \d \(process \d\)", text
        )
        assert "every .grad of the model is None" in text
        assert "the pipeline is dead: it failed in one of its processes" in text


def raised_by(pipe, x, y):
    """The text of what a step raises, with its kind and notes; empty if it raises nothing."""
    try:
        pipe.step(x, target=y)
    except (pe.PipelineError, KeyboardInterrupt) as error:
        return f"{type(error).__name__}: {error} {getattr(error, '__notes__', '')}"
    return ""


def before_it_begins(victim, place, error):
    """What the calls after a first step raise, of which the victim's first raises ``error`` before any task."""
    stages = [nn.Linear(4, 4) for _ in range(dist.get_world_size())]
    pipe = pe.Pipeline(stages, None, MICROBATCHES, "1f1b", F.mse_loss, mesh=dist.group.WORLD, timeout=300)
    x, y = torch.randn(8, 4), torch.randn(8, 4)
    pipe.step(x, target=y)
    stepper, found = pipe._stepper, []
    if dist.get_rank() == victim:
        at = {
            "cut": (stepper.cutter, "cut_inputs"),
            "draw": (stepper.random, "begin"),
            "refresh": (stepper.owners, "refresh"),
        }[place]
        with unittest.mock.patch.object(*at, side_effect=error):
            found.append(raised_by(pipe, x, y))
    found.append(raised_by(pipe, x, y))
    gone = [p.grad is None for module in pipe.stage_modules for p in module.parameters()]
    pipe.close()
    return found, gone


PLACES = pytest.mark.parametrize("victim, place", [(0, "cut"), (0, "draw"), (1, "draw"), (1, "refresh")])


@PLACES
def test_ctrl_c_before_a_step_begins_is_told_to_the_processes_that_wait_for_it(victim, place):
    found = run(2, before_it_begins, victim, place, KeyboardInterrupt("pressed"), timeout=50)
    (interrupted, again), gone = found[victim]
    assert interrupted.startswith("KeyboardInterrupt") and "every .grad of the model is None" in interrupted
    assert again.startswith("DeadPipeline") and all(gone)
    (heard,), gone = found[1 - victim]
    assert heard.startswith(("PeerError", "DeadPipeline"))  # the latter if it hears before it is in the step
    assert f"process {victim} failed: KeyboardInterrupt: pressed" in heard and all(gone)


@PLACES
def test_after_a_refusal_before_a_step_begins_the_next_call_is_the_step_that_others_wait_for(victim, place):
    found = run(2, before_it_begins, victim, place, pe.InvalidArgument("no such batch"), timeout=50)
    assert found[victim] == (["InvalidArgument: no such batch ", ""], [False, False])
    assert found[1 - victim] == ([""], [False, False])


@pytest.mark.parametrize("fault", ["die", "complain"])
def test_the_interpreter_of_the_others_ends_with_the_error_and_no_abort(fault):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    path = os.pathsep.join([str(Path(__file__).parents[1]), *filter(None, sys.path)])
    programs = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(store.port), fault],
            env={**os.environ, "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        _, text = programs[0].communicate(timeout=50)
        programs[1].communicate(timeout=50)
    finally:
        for program in programs:
            program.kill()
    assert programs[0].returncode == 1, text
    assert programs[1].returncode == (1 if fault == "complain" else -9)
    assert "pipeline_ext.errors.PeerError" in text and "process 1" in text


if __name__ == "__main__":
    this, port, name = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    at = dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=at, rank=this, world_size=2)
    raise two_steps(1, {"die": die, "complain": complain}[name], 300)[1]
