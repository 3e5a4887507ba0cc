"""What stops a step, and what is true afterwards."""

import _thread
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import traceback

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


class Trap(nn.Module):
    """A linear layer that runs ``self.spring()`` in a chosen forward or backward."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.when = None  # (kind, microbatch)
        self.spring = None
        self.seen = {"F": 0, "B": 0}
        self.running = 0

    def set(self, kind, microbatch, spring):
        self.when, self.spring = (kind, microbatch), spring
        self.seen = {"F": 0, "B": 0}

    def _pass(self, kind):
        m = self.seen[kind]
        self.seen[kind] += 1
        if self.when == (kind, m):
            self.spring()

    def forward(self, x):
        self._pass("F")
        y = self.linear(x)
        if y.requires_grad:
            y.register_hook(lambda grad: self._pass("B"))
        return y


def trapped(stages=3):
    return [Trap() for _ in range(stages)]


def batch(rows=6):
    return torch.randn(rows, 4), torch.randn(rows, 4)


def throw(error):
    def spring():
        raise error

    return spring


def assert_next_step_works(pipe, stages):
    for stage in stages:
        stage.when = None
    model = nn.Sequential(*stages)
    x, y = batch()
    plain = twin(model)
    reference_step(plain, x, y, pipe.microbatches, F.mse_loss)
    pipe.step(x, target=y)
    assert_same_gradients(model, gradients(plain))


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_an_exception_anywhere_stops_the_step_and_names_its_place(schedule, overlap):
    stages = trapped()
    model = nn.Sequential(*stages)
    with pe.Pipeline(stages, microbatches=3, schedule=schedule, loss_fn=F.mse_loss, overlap=overlap) as pipe:
        for s in range(3):
            for kind, word in (("F", "forward"), ("B", "backward")):
                for m in range(3):
                    for stage in stages:
                        stage.when = None
                    original = ValueError("the trap")
                    stages[s].set(kind, m, throw(original))
                    x, y = batch()
                    with pytest.raises(pe.StageError) as caught:
                        pipe.step(x, target=y)
                    error = caught.value
                    assert (error.action, error.stage) == (f"{s}{kind}{m}", s)
                    assert (error.microbatch, error.rank) == (m, s)
                    assert f"the {word} of microbatch {m} at stage {s} on rank {s}" in str(error)
                    assert "ValueError: the trap" in str(error)
                    assert "every .grad of the model is None" in str(error)
                    assert error.__cause__ is original
                    frames = traceback.extract_tb(original.__traceback__)
                    assert any(frame.name == "spring" for frame in frames)
                    assert all(p.grad is None for p in model.parameters())
        assert_next_step_works(pipe, stages)


def test_no_task_runs_on_after_a_failure():
    # Stage 0 goes on with forwards while stage 2 fails; once step has raised, nothing runs.
    running, after = [], []
    raised = threading.Event()

    class Slow(nn.Module):
        def forward(self, x):
            (after if raised.is_set() else running).append(1)
            time.sleep(0.01)
            return x

    trap = Trap()
    trap.set("F", 0, throw(ValueError("no")))
    with pe.Pipeline([Slow(), Slow(), trap], microbatches=8, schedule="gpipe", loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError):
            pipe.step(torch.randn(8, 4), target=torch.randn(8, 4))
        raised.set()
        time.sleep(0.1)
        assert running and not after


def test_gradients_of_earlier_steps_are_gone_too():
    stages = trapped()
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        x, y = batch()
        pipe.step(x, target=y)
        stages[0].set("B", 2, throw(ValueError("no")))
        with pytest.raises(pe.StageError):
            pipe.step(x, target=y)
        assert all(p.grad is None for stage in stages for p in stage.parameters())


@pytest.mark.parametrize("kind", ["F", "B"])
def test_keyboard_interrupt_raised_in_a_stage_stays_one(kind):
    stages = trapped()
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        stages[1].set(kind, 1, throw(KeyboardInterrupt()))
        x, y = batch()
        with pytest.raises(KeyboardInterrupt) as caught:
            pipe.step(x, target=y)
        assert any(f"1{kind}1" in note for note in caught.value.__notes__)
        assert all(p.grad is None for stage in stages for p in stage.parameters())
        assert_next_step_works(pipe, stages)


def test_ctrl_c_is_seen_in_the_middle_of_a_step():
    stages = trapped()
    pressed = []

    def press():
        pressed.append(time.perf_counter())
        _thread.interrupt_main(signal.SIGINT)

    with pe.Pipeline(stages, microbatches=60, loss_fn=F.mse_loss) as pipe:
        for stage in stages:
            stage.linear.register_forward_hook(lambda *_: time.sleep(0.02))
        stages[0].set("F", 3, press)
        x, y = batch(60)
        with pytest.raises(KeyboardInterrupt) as caught:
            pipe.step(x, target=y)
        # A poll comes every 50 ms and a task takes 20; the whole step would take well over a second.
        assert time.perf_counter() - pressed[0] < 0.5
        assert any("every .grad of the model is None" in n for n in caught.value.__notes__)
        assert sum(stage.seen["F"] for stage in stages) < 180
        assert all(p.grad is None for stage in stages for p in stage.parameters())
        for stage in stages:
            stage.linear._forward_hooks.clear()
        pipe.step(x, target=y)


def test_what_a_stage_cannot_take_is_shown():
    class Two(nn.Module):
        def forward(self, x):
            return x, x

    with pe.Pipeline([Two(), nn.Linear(4, 4)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError) as caught:
            pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
        assert "1F0" in str(caught.value)
        assert "stage 1 was given (float32[2, 4], float32[2, 4]) by stage 0" in str(caught.value)
    with pe.Pipeline([nn.Linear(4, 3), nn.Linear(4, 4)], microbatches=2, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError, match=r"stage 1 was given float32\[2, 3\] by stage 0"):
            pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


def test_a_loss_that_is_no_tensor_is_refused():
    with pe.Pipeline([nn.Linear(4, 4)], microbatches=2, loss_fn=lambda out: 1.0) as pipe:
        with pytest.raises(pe.StageError, match="must be a real tensor without dimensions.*got float"):
            pipe.step(torch.randn(4, 4))


def test_a_loss_that_is_no_scalar_is_refused():
    def loss_fn(out, target):
        return F.mse_loss(out, target, reduction="none")

    with pe.Pipeline([nn.Linear(4, 4)], microbatches=2, loss_fn=loss_fn) as pipe:
        with pytest.raises(pe.StageError, match=r"must be a real tensor without dimensions.*float32\[2, 4\]"):
            pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


@pytest.mark.parametrize("kind", ["F", "B"])
def test_a_stage_that_does_not_return_in_time_kills_the_pipeline(kind):
    stages = trapped()
    let_go = threading.Event()
    ended = threading.Event()
    pipe = pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss, timeout=0.3)
    stages[1].set(kind, 0, lambda: (let_go.wait(30), ended.set()))
    x, y = batch()
    begin = time.perf_counter()
    with pytest.raises(pe.StepTimeout) as caught:
        pipe.step(x, target=y)
    assert time.perf_counter() - begin < 5
    text = str(caught.value)
    assert "no progress for 0.3 seconds" in text
    assert f"rank 1: 1{kind}0 is running and has not returned" in text
    assert "rank 0: 0B0 waits for 1B0 on rank 1" in text
    assert "the pipeline is dead" in text
    assert all(p.grad is None for stage in stages for p in stage.parameters())
    with pytest.raises(pe.DeadPipeline, match="never returned"):
        pipe.step(x, target=y)
    # The thread comes back and goes on with its task: it may not touch .grad.
    let_go.set()
    assert ended.wait(10)
    time.sleep(0.2)
    assert all(p.grad is None for stage in stages for p in stage.parameters())
    pipe.close()
    # The model is unharmed.
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as fresh:
        assert_next_step_works(fresh, stages)


def test_a_slow_step_that_makes_progress_is_left_alone():
    stages = trapped(2)
    for stage in stages:
        stage.linear.register_forward_hook(lambda *_: time.sleep(0.1))
    with pe.Pipeline(stages, microbatches=14, loss_fn=F.mse_loss, timeout=1.0) as pipe:
        x, y = batch(14)
        pipe.step(x, target=y)
        assert pipe.trace.step_time > 1.0


def test_a_failing_eval_leaves_gradients_alone():
    stages = trapped()
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        x, y = batch()
        pipe.step(x, target=y)
        before = gradients(nn.Sequential(*stages))
        stages[1].set("F", 1, throw(ValueError("no")))
        with pytest.raises(pe.StageError, match="1F1"):
            pipe.eval(x)
        assert_same_gradients(nn.Sequential(*stages), before)
        stages[1].when = None
        pipe.eval(x)


def test_one_step_at_a_time():
    stages = trapped()
    inside, go = threading.Event(), threading.Event()
    stages[0].set("F", 0, lambda: (inside.set(), go.wait(10)))
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        x, y = batch()
        other = threading.Thread(target=lambda: pipe.step(x, target=y))
        other.start()
        assert inside.wait(10)
        with pytest.raises(pe.PipelineError, match="running a step already"):
            pipe.step(x, target=y)
        go.set()
        other.join()
        assert all(p.grad is not None for p in stages[0].parameters())


def test_a_closed_pipeline_says_so():
    pipe = pe.Pipeline(trapped(), microbatches=3, loss_fn=F.mse_loss)
    pipe.close()
    pipe.close()
    with pytest.raises(pe.DeadPipeline, match="closed"):
        pipe.step(*batch()[:1], target=batch()[1])


def test_closing_stops_a_running_step():
    stages = trapped()
    inside, raised = threading.Event(), []
    for stage in stages:
        stage.linear.register_forward_hook(lambda *_: (inside.set(), time.sleep(0.01)))
    pipe = pe.Pipeline(stages, microbatches=60, loss_fn=F.mse_loss)

    def step():
        try:
            pipe.step(*batch(60)[:1], target=batch(60)[1])
        except pe.DeadPipeline as error:
            raised.append(str(error))

    other = threading.Thread(target=step)
    other.start()
    assert inside.wait(10)
    pipe.close()
    other.join(10)
    assert "closed while a step ran; every .grad of the model is None" in raised[0]


def test_a_stage_may_close_its_pipeline():
    stages = trapped()
    pipe = pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss)
    stages[1].set("F", 1, pipe.close)
    x, y = batch()
    with pytest.raises(pe.DeadPipeline, match="closed while a step ran"):
        pipe.step(x, target=y)
    with pytest.raises(pe.DeadPipeline, match="closed"):
        pipe.step(x, target=y)


def test_a_hang_inside_a_parameters_own_hook_leaves_no_gradient():
    stages = trapped(1)
    let_go, ended = threading.Event(), threading.Event()
    stages[0].linear.weight.register_hook(lambda grad: (let_go.wait(30), ended.set())[2:] or None)
    pipe = pe.Pipeline(stages, microbatches=1, loss_fn=F.mse_loss, timeout=0.2)
    x, y = batch()
    with pytest.raises(pe.StepTimeout):
        pipe.step(x, target=y)
    let_go.set()
    assert ended.wait(10)
    time.sleep(0.2)
    assert all(p.grad is None for p in stages[0].parameters())


def test_tied_parameters_are_whole_after_a_hang():
    stages = trapped(2)
    stages[1].linear.weight = stages[0].linear.weight
    weight, let_go = stages[0].linear.weight, threading.Event()
    pipe = pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss, timeout=0.2)
    stages[1].set("F", 0, lambda: let_go.wait(30))
    x, y = batch()
    with pytest.raises(pe.StepTimeout):
        pipe.step(x, target=y)
    assert stages[0].linear.weight is weight and stages[1].linear.weight is weight
    let_go.set()
    del pipe


def test_an_abandoned_thread_that_raises_does_not_hold_up_the_caller():
    for _ in range(5):
        stages = trapped(1)
        let_go = threading.Event()

        def late(let_go=let_go):
            let_go.wait(30)
            raise ValueError("late")

        stages[0].set("F", 0, late)
        pipe = pe.Pipeline(stages, microbatches=1, loss_fn=F.mse_loss, timeout=0.1)
        x, y = batch()
        with pytest.raises(pe.StepTimeout):
            pipe.step(x, target=y)
        let_go.set()
        for _ in range(2000):
            with pytest.raises(pe.DeadPipeline):
                pipe.step(x, target=y)


def test_what_fails_after_the_tasks_leaves_no_gradients_either():
    def fail(parameter):
        raise RuntimeError("cannot be applied")

    stages = [nn.Linear(4, 4)]
    stages[0].bias.register_post_accumulate_grad_hook(fail)
    with pe.Pipeline(stages, microbatches=3, loss_fn=lambda out: out.sum()) as pipe:
        with pytest.raises(RuntimeError, match="cannot be applied") as caught:
            pipe.step(torch.randn(6, 4))
        assert "every .grad of the model is None" in caught.value.__notes__[0]
        assert stages[0].weight.grad is None
        with pytest.raises(pe.InvalidArgument, match="losses is a tuple; give a list"):
            pipe.step(torch.randn(6, 4), losses=())


def test_a_stage_error_survives_pickling():
    error = pe.StageError("text", action="1B3", stage=1, microbatch=3, rank=0)
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.action, again.stage) == ("text", "1B3", 1)


def test_a_fork_is_refused_and_can_exit():
    with pe.Pipeline(trapped(), microbatches=3, loss_fn=F.mse_loss) as pipe:
        x, y = batch()
        pipe.step(x, target=y)
        child = os.fork()
        if child == 0:
            status = 1
            try:
                pipe.step(x, target=y)
            except pe.DeadPipeline:
                pipe.close()
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        pipe.step(x, target=y)


def run_python(code, **kwargs):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        **kwargs,
    )


def test_the_interpreter_exits_with_pipelines_open():
    result = run_python(
        """
        import torch, pipeline_ext as pe
        pipe = pe.Pipeline([torch.nn.Linear(2, 2)] * 2, microbatches=2, loss_fn=lambda o: o.sum())
        pipe.step(torch.randn(4, 2))
        print("end")
        """
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "end\n", "")


def test_the_interpreter_exits_while_a_daemon_thread_steps():
    result = run_python(
        """
        import threading, time, torch, pipeline_ext as pe
        pipe = pe.Pipeline([torch.nn.Linear(2, 2)] * 2, microbatches=2, loss_fn=lambda o: o.sum())
        x = torch.randn(4, 2)
        def loop():
            try:
                while True:
                    pipe.step(x)
            except pe.DeadPipeline:
                pass
        threading.Thread(target=loop, daemon=True).start()
        time.sleep(0.3)
        """
    )
    assert result.returncode == 0, result.stderr


def test_the_interpreter_exits_with_a_thread_abandoned():
    result = run_python(
        """
        import time, torch, pipeline_ext as pe
        class Stuck(torch.nn.Module):
            def forward(self, x):
                while True:
                    time.sleep(0.001)
        pipe = pe.Pipeline([Stuck()], microbatches=1, loss_fn=lambda o: o.sum(), timeout=0.2)
        try:
            pipe.step(torch.randn(4, 2))
        except pe.StepTimeout:
            print("timed out")
        """
    )
    assert (result.returncode, result.stdout) == (0, "timed out\n"), result.stderr
    assert "terminate" not in result.stderr


def test_every_public_error_derives_from_one():
    errors = [getattr(pe, name) for name in pe.__all__]
    errors = [e for e in errors if isinstance(e, type) and issubclass(e, BaseException)]
    assert len(errors) == 10
    assert all(issubclass(e, pe.PipelineError) for e in errors)
