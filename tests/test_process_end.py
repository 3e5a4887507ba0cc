"""A process with a pipeline ends as one without: with its own exit status, by no signal, and without a hang."""

import signal
import textwrap

import pytest
from endings import end_of

BEGINNING = """
import atexit, functools, os, signal, sys, threading, time
import torch
from torch import nn
import pipeline_ext as pe

print = functools.partial(print, flush=True)
x = torch.randn(4, 4)

def loss_fn(out):
    return out.sum()
"""

ENDS = {  # what a program does last, and the status that it would have without a pipeline
    "": 0,
    "sys.exit(3)": 3,
    "raise SystemExit('words')": 1,
    "raise ValueError('mine')": 1,
    "raise KeyboardInterrupt": -signal.SIGINT,
    "os._exit(4)": 4,
    "atexit.register(os._exit, 5)": 5,
    "sys.stdout = open(1, 'w', closefd=False); sys.stdout.write('lost'); os.close(1)": 120,
}

# What a stage does that never returns.
STUCK = {
    "short operations": "while True: a = torch.tanh(a @ a)",
    "a long operation": "torch.randn(3000, 3000).matrix_power(100000)",
    "backwards": "while True: torch.tanh(a @ nn.Linear(64, 64).weight).sum().backward()",
    "a compiled loop": "loop(a)",
    "a backward in Python": "y = Loop.apply(y)",
    "a hook of the backward": "y.register_hook(sleep)",
    "a function of autograd": "Sleep.apply(y)",
    "a sleep": "sleep(y)",
    "a lock": "lock = threading.Lock(); lock.acquire(); lock.acquire()",
    "plain Python": "while True: pass",
    "Python that stops for nothing": "nothing_stops()",
}

WITH_A_STUCK_STAGE = """
@torch.jit.script
def loop(a):
    i = 0
    while i < 1000000000:
        a = torch.tanh(a @ a)
        i += 1
    return a

def sleep(_):
    while True:
        time.sleep(0.001)

def nothing_stops():
    while True:
        try:
            while True:
                time.sleep(0.001)
        except BaseException:
            pass

class Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        sleep(x)

class Loop(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, grad):
        a = torch.randn(64, 64)
        while True:
            a = torch.tanh(a @ a)

class Stuck(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        a = torch.randn(64, 64)
        {stuck}
        return y

pipe = pe.Pipeline([Stuck(4, 4), nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn, timeout=0.2)
atexit.register(lambda: sys.stderr.write("a handler\\n"))
try:
    pipe.step(x)
except pe.StepTimeout:
    print("timed out")
{end}
"""


def check(ending, end):
    assert ending.code == ENDS[end], ending
    assert "terminate" not in ending.err and "Fatal" not in ending.err
    if "ValueError" in end:
        assert "\nValueError: mine\n" in ending.err


each_end = pytest.mark.parametrize(
    "end", [pytest.param(end, marks=[pytest.mark.every] * (end != "sys.exit(3)")) for end in ENDS]
)


@each_end
@pytest.mark.parametrize("stuck", STUCK)
def test_an_abandoned_thread_does_not_change_how_the_process_ends(stuck, end):
    program = WITH_A_STUCK_STAGE.format(stuck=STUCK[stuck], end=end)
    ending = end_of(BEGINNING + program)
    check(ending, end)
    assert ending.out == "timed out\n"
    assert ("a handler\n" in ending.err) == ("_exit" not in end)


# Where a program ends, with a pipeline in each state.
PHASES = {
    "in a forward, as the model is cut": """
        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

            def forward(self, x):
                x = self.first(x)
                {end}
                return self.second(x)

        pe.Pipeline(Net(), num_stages=2, microbatches=2, loss_fn=loss_fn, sample=x)
    """,
    "with a pipeline that was never used": """
        pipe = pe.Pipeline([nn.Linear(4, 4)] * 2, microbatches=2, loss_fn=loss_fn)
        {end}
    """,
    "in a stage's forward": """
        class Ends(nn.Linear):
            def forward(self, x):
                {end}
                return super().forward(x)

        pipe = pe.Pipeline([nn.Linear(4, 4), Ends(4, 4)], microbatches=2, loss_fn=loss_fn)
        pipe.step(x)
    """,
    "in a stage's backward": """
        def ends(grad):
            {end}

        class Ends(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                y.register_hook(ends)
                return y

        pipe = pe.Pipeline([Ends(4, 4), nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn)
        pipe.step(x)
    """,
    "between steps": """
        pipe = pe.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn)
        for step in range(3):
            pipe.step(x)
            if step == 1:
                {end}
    """,
    "while a daemon thread trains": """
        model = nn.Sequential(nn.Linear(4, 400), nn.Linear(400, 4))
        pipe = pe.Pipeline(model, num_stages=2, microbatches=2, loss_fn=loss_fn)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
        began = threading.Event()

        def train():
            try:
                while True:
                    pipe.step(x)
                    optimizer.step()
                    began.set()
            except pe.DeadPipeline:
                pass

        threading.Thread(target=train, daemon=True).start()
        began.wait()
        {end}
    """,
    "while a daemon thread is in a stage that never returns": """
        began = threading.Event()

        class Stuck(nn.Linear):
            def forward(self, x):
                began.set()
                while True:
                    x = torch.tanh(x @ x)

        pipe = pe.Pipeline([nn.Linear(4, 4), Stuck(4, 4)], microbatches=2, loss_fn=loss_fn)
        threading.Thread(target=pipe.step, args=[x[:, :4]], daemon=True).start()
        began.wait()
        {end}
    """,
    "while another thread ends its training": """
        pipe = pe.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn)
        began = threading.Event()

        def train():
            for _ in range(30):
                pipe.step(x)
                began.set()

        threading.Thread(target=train).start()
        began.wait()
        {end}
    """,
    "with a handler that makes a last step": """
        pipe = pe.Pipeline([nn.Linear(4, 4), nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn)
        atexit.register(pipe.step, x)
        {end}
    """,
}


@each_end
@pytest.mark.parametrize("phase", PHASES)
def test_a_program_ends_as_it_says_with_a_pipeline_in_any_state(phase, end):
    inserted = end or "pass"
    ending = end_of(BEGINNING + textwrap.dedent(PHASES[phase]).format(end=inserted))
    if end.startswith("raise ValueError") and "in a stage" in phase and "returns" not in phase:
        assert ending.code == 1 and "StageError" in ending.err and "ValueError: mine" in ending.err
    else:
        check(ending, end)


def test_ctrl_c_ends_a_program_as_python_does():
    ending = end_of(
        BEGINNING
        + """
class Presses(nn.Linear):
    def forward(self, x):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        return super().forward(x)

pipe = pe.Pipeline([nn.Linear(4, 4), Presses(4, 4)], microbatches=2, loss_fn=loss_fn)
pipe.step(x)
"""
    )
    assert ending.code == -signal.SIGINT
    assert ending.err.endswith("every .grad of the model is None; buffers and random state may have advanced\n")
