"""When a GPU, its driver, or a stage on it fails: one clear error, nothing left behind, and no hang."""

import contextlib
import gc
import random
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from device_double import install
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe

OUT_OF_MEMORY, LAUNCH_FAILED = 2, 719
# What takes down what there is; nobody hears of its errors, and something may stay.
TAKES_DOWN = (
    "cuEventDestroy", "cuStreamDestroy", "cuStreamGetCaptureInfo", "cuDevicePrimaryCtxRelease",
    "cuCtxPushCurrent", "cuCtxPopCurrent", "cuThreadExchangeStreamCaptureMode",
)  # fmt: skip
OF_TORCH = ("cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy", "cuGraphExecDestroy")


def make():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def left(standin):
    """What is alive; streams that wait for the next pipeline are taken down."""
    gc.collect()
    pe._C.empty_stream_pool()
    return standin.live()


class Scenario:
    """A pipeline's life: made, three steps, an evaluation, closed."""

    def __init__(self, **options):
        self.model = make()
        self.x = torch.randn(6, 4)
        self.options = options
        self.pipe = None

    def run(self):
        try:
            self.pipe = pe.Pipeline(self.model, 2, 3, loss_fn=F.mse_loss, **self.options)
            for _ in range(3):
                self.model.zero_grad()
                self.pipe.step(self.x, target=self.x)
            self.pipe.eval(self.x)
        finally:
            self.model.zero_grad()

    def step_again(self):
        """Whether another step gives the right gradients; False if the pipeline is dead."""
        plain = twin(self.model)
        reference_step(plain, self.x, self.x, 3, F.mse_loss)
        try:
            self.pipe.step(self.x, target=self.x)
        except pe.DeadPipeline as error:
            assert "a GPU has failed" in str(error)
            return False
        assert_same_gradients(self.model, gradients(plain))
        return True


@pytest.mark.parametrize("sticky", [False, True], ids=["one call fails", "the device fails"])
@pytest.mark.parametrize(
    "devices, options",
    [(1, {}), (2, {}), (1, {"graphs": True})],
    ids=["one GPU", "two GPUs", "graphs"],
)
def test_every_error_of_the_driver_at_every_call(
    standin, monkeypatch, capsys, request, devices, options, sticky
):
    install(monkeypatch, standin, devices)
    assert pe._C.num_devices() > 0  # the driver is opened once
    left(standin)
    standin.reset(devices)
    counted = Scenario(**options)
    counted.run()
    counted.pipe.close()
    names = [call.name for call in standin.log() if call.name.startswith("cu")]
    del counted
    before = left(standin)
    calls = [number for number, name in enumerate(names) if name not in OF_TORCH]
    # One of so many calls and one of each function; all would take minutes, and are tried in C++.
    every = (19 if sticky else 11) * (1 if request.config.getoption("--all") else 3)
    random.Random(f"{devices}, {options}, {sticky}").shuffle(calls)
    failing = {*calls[::every], *{names[number]: number for number in calls}.values()}
    assert {names[number] for number in failing} == {*names} - {*OF_TORCH}
    for number in sorted(failing):
        name = names[number]
        standin.reset(devices)
        scenario = Scenario(**options)
        (standin.fail_sticky if sticky else standin.fail_at)(number, LAUNCH_FAILED if sticky else OUT_OF_MEMORY)
        code = LAUNCH_FAILED if sticky else OUT_OF_MEMORY
        try:
            scenario.run()
        except pe.DeviceError as error:
            assert f"({code})" in str(error) and "failed: CUDA_ERROR" in str(error), (number, name)
        except RuntimeError as error:  # of the double's own graph, as torch would raise it
            assert options and f"CUDA error {code}" in str(error), (number, name, error)
        else:
            # What only takes down may fail unheard; a graph that cannot be captured is done without.
            fell_back = scenario.pipe.graph is not None and scenario.pipe.graph.fallback is not None
            assert sticky or name in TAKES_DOWN or fell_back, (number, name)
        standin.reset(devices)
        if scenario.pipe is not None:
            scenario.step_again()
            scenario.pipe.close()
        del scenario
        after = left(standin)
        slack = 1 if name in TAKES_DOWN else 0
        if not sticky:
            more = {kind: after[kind] - before[kind] for kind in after}
            assert all(count <= slack for count in more.values()), (number, name, more)
        before = after
    capsys.readouterr()


class Fails(nn.Module):
    def __init__(self, error=None, backward=False):
        super().__init__()
        self.error, self.backward, self.left = error, backward, 2

    def _fail(self, *_):
        self.left -= 1
        if self.left == 0:
            raise self.error

    def forward(self, x):
        if self.backward:
            x = x * 1
            x.register_hook(self._fail)
        else:
            self._fail()
        return x


@pytest.mark.parametrize("backward", [False, True])
def test_a_stage_that_raises_is_named_and_the_next_step_works(gpus, backward):
    model = nn.Sequential(nn.Linear(4, 4), Fails(ValueError("no"), backward))
    x = torch.randn(6, 4)
    with pe.Pipeline(model, cuts=[1], microbatches=3, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.StageError, match="raised ValueError: no") as caught:
            pipe.step(x, target=x)
        assert (caught.value.stage, caught.value.microbatch) == (1, 1)
        assert all(p.grad is None for p in model.parameters())
        plain = nn.Sequential(twin(model[0]))
        reference_step(plain, x, x, 3, F.mse_loss)
        pipe.step(x, target=x)
        assert torch.equal(model[0].weight.grad, plain[0].weight.grad)


def test_a_pipeline_that_failed_is_let_go_of_at_once(gpus):
    model, x = make(), torch.randn(6, 5)
    gc.disable()
    try:
        pipe = pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss)
        alive = weakref.ref(pipe)
        with contextlib.suppress(pe.StageError):
            pipe.step(x, target=x)
        del pipe
        assert alive() is None
    finally:
        gc.enable()


def test_ctrl_c_in_a_stage_stays_what_it_is(gpus):
    model = nn.Sequential(nn.Linear(4, 4), Fails(KeyboardInterrupt()))
    x = torch.randn(6, 4)
    with pe.Pipeline(model, cuts=[1], microbatches=3, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(KeyboardInterrupt):
            pipe.step(x, target=x)
        pipe.step(x, target=x)


def test_the_host_is_at_most_two_steps_ahead_and_a_device_that_stands_still_ends_in_an_error(gpus, standin):
    model, x = make(), torch.randn(6, 4)
    plain = twin(model)
    reference_step(plain, x, x, 3, F.mse_loss)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss, devices=["cuda:0"] * 2, timeout=0.2) as pipe:
        drain, standin.drain = standin.drain, lambda: None
        standin.pause()
        pipe.step(x, target=x)
        pipe.step(x, target=x)
        with pytest.raises(pe.StepTimeout, match="a GPU has not ended the step before the last one"):
            pipe.step(x, target=x)
        assert all(p.grad is None for p in model.parameters())
        standin.pause(False)
        drain()
        pipe.step(x, target=x)
        assert_same_gradients(model, gradients(plain))


class Closes(nn.Module):
    def __init__(self, close):
        super().__init__()
        self.close = close

    def forward(self, x):
        self.close()
        return x


def in_a_thread(call):
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


@pytest.mark.parametrize("run", [lambda call: call(), in_a_thread], ids=["by a stage", "by another thread"])
def test_closed_in_a_step_it_ends_there(gpus, standin, run):
    before = left(standin)
    x, pipes = torch.randn(6, 4), []
    model = nn.Sequential(nn.Linear(4, 4), Closes(lambda: run(pipes[0].close)))
    pipes.append(pe.Pipeline(model, cuts=[1], microbatches=3, loss_fn=F.mse_loss))
    with pytest.raises(pe.DeadPipeline, match="closed while a step ran"):
        pipes[0].step(x, target=x)
    with pytest.raises(pe.DeadPipeline, match="closed"):
        pipes[0].step(x, target=x)
    del model
    pipes.clear()
    assert left(standin) == before


def test_many_pipelines_leave_nothing_behind(gpus, standin):
    def use():
        model, x = make(), torch.randn(6, 4)
        pipe = pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss)
        pipe.step(x, target=x)
        pipe.eval(x)

    use()
    gc.collect()
    before = standin.live()
    for _ in range(5):
        use()
    gc.collect()
    assert standin.live() == before
