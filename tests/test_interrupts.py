"""Ctrl-C at any moment: the next call works, gradients are all there or none, nothing else has changed."""

import contextlib
import os
import random
import signal
import threading
import time

import pytest
import torch
import torch.nn.functional as F
from interrupts import Interrupt, count
from torch import nn

import pipeline_ext as pe


class Pipe:
    """A pipeline of a model with all that a step takes out for a while: hooks, ties, modes, random streams."""

    def __init__(self, tied=True, schedule="1f1b", **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)], nn.Dropout(0.5))
        if tied:
            self.model[3].weight = self.model[0].weight
        self.hooked = []
        self.model[1].weight.register_post_accumulate_grad_hook(self.hooked.append)
        self.x = torch.randn(8, 8)
        stages = {"num_stages": 4, "devices": ["cpu"] * 2} if "interleaved" in schedule else {"num_stages": 2}
        self.pipe = pe.Pipeline(
            self.model, microbatches=4, schedule=schedule, loss_fn=F.mse_loss, **stages, **options
        )
        self.wanted = self.gradients()
        self.model.zero_grad()

    def gradients(self):
        torch.manual_seed(1)
        self.pipe.step(self.x, target=self.x)
        return [p.grad.clone() for p in self.model.parameters()]

    def check(self, where):
        """The model is as ever, and a step is right."""
        assert torch.is_grad_enabled(), where
        there = [p.grad is not None for p in self.model.parameters()]
        assert all(there) or not any(there), (where, there)
        assert all(module.training for module in self.model.modules()), where
        self.model.zero_grad()
        self.hooked.clear()
        found = self.gradients()
        self.model.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(found, self.wanted, strict=True)), where
        assert len(self.hooked) == 1, where


CALLS = {
    "step": lambda it: it.pipe.step(it.x, target=it.x),
    "step with losses and outputs": lambda it: it.pipe.step(it.x, target=it.x, losses=[], return_outputs=True),
    "eval": lambda it: it.pipe.eval(it.x),
    "verify": lambda it: it.pipe.verify(it.x, target=it.x),
    "clip": lambda it: it.pipe.clip_grad_norm_(1.0),
    "state": lambda it: it.pipe.load_state_dict(it.pipe.state_dict()),
}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("call", CALLS)
def test_an_interrupt_at_any_instruction_leaves_nothing_behind(call, tied, request):
    it = Pipe(tied)
    CALLS[call](it)
    it.model.zero_grad()
    instructions = count(lambda: CALLS[call](it))
    it.model.zero_grad()
    chosen = range(instructions)
    few = 100 if call == "verify" else 200
    if not request.config.getoption("--all") and instructions > few:
        chosen = random.Random(0).sample(chosen, few)
    for instruction in chosen:
        with Interrupt(instruction) as interrupt:
            try:
                CALLS[call](it)
            except KeyboardInterrupt as error:
                notes = " ".join(getattr(error, "__notes__", []))
        if call != "clip" and "every .grad of the model is None" in notes:
            assert all(p.grad is None for p in it.model.parameters()), interrupt.at
        it.check(interrupt.at)


SCHEDULES = ["gpipe", "1f1b", "interleaved-1f1b", "zb-h1", "zb-h2"]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tied", [True, False])
def test_signals_at_random_moments(schedule, tied, request):
    it, rng = Pipe(tied, schedule), random.Random(schedule)
    calls = [CALLS["step"], CALLS["step"], CALLS["eval"]]
    calls[0](it)
    late = []

    def now(*_):
        late.append(time.monotonic())
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, now)
    interrupted = 0
    try:
        for _ in range(1000 if request.config.getoption("--all") else 40):
            began = time.monotonic()
            it.check(f"{schedule}")
            a_call = time.monotonic() - began  # now, as other load makes it longer and shorter
            due = rng.uniform(1e-4, a_call)
            at = time.monotonic() + due
            try:
                signal.setitimer(signal.ITIMER_REAL, due)
                rng.choice(calls)(it)
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupted += 1
                assert late.pop() - at < 2.0  # 0.2 where nothing else runs
            signal.setitimer(signal.ITIMER_REAL, 0)
        it.check(f"{schedule}")
    finally:
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 5


class Saves:
    """A pipeline and its optimizer with a checkpoint of two states: as they are, and another."""

    def __init__(self, folder):
        self.it = Pipe()
        self.path = folder / "checkpoint"
        self.optimizer = torch.optim.AdamW(self.it.model.parameters())
        self.it.gradients()
        self.optimizer.step()
        self.it.model.zero_grad()
        self.it.wanted = self.it.gradients()
        self.it.model.zero_grad()
        self.now = self.all_state()
        with torch.no_grad():
            for tensor in self.all_state(copies=False):
                tensor.add_(1)
        self.saved = self.all_state()
        self.save(0)
        self.put_back()

    def all_state(self, copies=True):
        of_optimizer = [v for state in self.optimizer.state.values() for v in state.values()]
        tensors = [*self.it.model.state_dict().values(), *of_optimizer]
        return [t.clone() for t in tensors] if copies else tensors

    def put_back(self):
        with torch.no_grad():
            for tensor, value in zip(self.all_state(copies=False), self.now, strict=True):
                tensor.copy_(value)

    def save(self, number):
        pe.save_checkpoint(self.path, self.it.pipe, self.optimizer, number=number)

    def load(self):
        return pe.load_checkpoint(self.path, self.it.pipe, self.optimizer)["number"]

    def is_in(self, state):
        return all(map(torch.equal, self.all_state(), state))


@contextlib.contextmanager
def interrupted_after(seconds):
    """A real signal; where it comes too late, it does not come."""

    def now(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, now)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def moments(call, request, rng):
    """Interrupts at instructions of ``call``, and by signals at random times of its run."""
    instructions = count(call)
    few = instructions if request.config.getoption("--all") else 60
    began = time.monotonic()
    call()
    took = time.monotonic() - began
    yield from map(Interrupt, rng.sample(range(instructions), few))
    yield from (interrupted_after(rng.uniform(1e-5, 1.2 * took)) for _ in range(few))


def test_an_interrupted_save_leaves_one_whole_checkpoint_and_nothing_else(tmp_path, request):
    saves = Saves(tmp_path)
    kept, last = 0, None
    descriptors = len(os.listdir("/proc/self/fd"))
    for number, moment in enumerate(moments(lambda: saves.save(0), request, random.Random(1)), 1):
        try:
            with moment:
                saves.save(number)
        except KeyboardInterrupt as error:
            last = error  # with its traceback, as a notebook keeps it
        found = saves.load()
        assert found in (kept, number)
        saves.save(found)  # nothing left of the other stops a later one
        assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
        kept = found
    assert last is not None
    saves.it.check("after interrupted saves")
    # Ctrl-C that comes as os.open returns loses what it has opened: Python has no other way.
    assert len(os.listdir("/proc/self/fd")) <= descriptors + 8 + number // 20


def test_an_interrupted_load_leaves_all_as_it_was_or_as_it_was_saved(tmp_path, request):
    saves = Saves(tmp_path)
    for moment in moments(saves.load, request, random.Random(2)):
        saves.put_back()
        with contextlib.suppress(KeyboardInterrupt), moment:
            saves.load()
        assert saves.is_in(saves.now) or saves.is_in(saves.saved)
        saves.load()
        assert saves.is_in(saves.saved)


class Slow(nn.Module):
    def __init__(self, began, may_end):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.began, self.may_end = began, may_end

    def forward(self, x):
        self.began.set()
        assert self.may_end.wait(60)
        return x * self.weight


def test_a_second_pipeline_of_a_model_is_refused_while_the_first_is_in_a_step():
    began, may_end = threading.Event(), threading.Event()
    model, x = nn.Sequential(nn.Linear(8, 8), Slow(began, may_end)), torch.randn(4, 8)
    options = {"num_stages": 2, "microbatches": 2, "loss_fn": F.mse_loss}
    with pe.Pipeline(model, **options) as first, pe.Pipeline(model, **options) as second:
        with pe.Pipeline(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), **options) as other:
            thread = threading.Thread(target=first.step, args=(x,), kwargs={"target": x})
            thread.start()
            assert began.wait(60)
            for call in (lambda: second.step(x, target=x), lambda: second.eval(x), second.state_dict):
                with pytest.raises(
                    pe.PipelineError, match="while another pipeline of the same model is running"
                ):
                    call()
            with pytest.raises(pe.PipelineError, match="while this pipeline is running a step already"):
                first.state_dict()
            other.step(x, target=x)
            may_end.set()
            thread.join()
        once = [p.grad.clone() for p in model.parameters()]
        second.step(x, target=x)
        for p, grad in zip(model.parameters(), once, strict=True):
            torch.testing.assert_close(p.grad, 2 * grad)
