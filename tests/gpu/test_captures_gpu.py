"""Captures that are not the pipeline's: by the caller, and by other threads."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from models import Residual
from reference import gradients, reference_step
from torch import nn

import pipeline_ext as pe

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LANES = {"devices": ["cuda:0"] * 4}
GRAPHS = {"devices": ["cuda:0"] * 4, "graphs": True}
MODES = pytest.mark.parametrize("mode", [LANES, GRAPHS], ids=["lanes", "graphs"])


def make(mode):
    model = nn.Sequential(*(Residual(64) for _ in range(4)))
    plain = copy.deepcopy(model).cuda()
    return pe.Pipeline(model, 4, 8, loss_fn=F.mse_loss, trace=False, **mode), model, plain


def batch():
    return torch.randn(32, 64, device="cuda"), torch.randn(32, 64, device="cuda")


def check_step(pipe, model, plain, x, y):
    plain.zero_grad()
    reference_step(plain, x, y, 8, F.mse_loss)
    model.zero_grad()
    pipe.step(x, target=y)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, gradients(plain)[name], rtol=1e-4, atol=1e-6)


class Capture:
    """A capture in another thread, in CUDA's default mode, while a block runs.

    Not by torch.cuda.graph, which gives all unused memory back before it begins.
    """

    def __enter__(self):
        self.begun, self.end = threading.Event(), threading.Event()
        self.error = None
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.begun.wait()
        return self

    def __exit__(self, *_):
        self.end.set()
        self.thread.join()

    def _run(self):
        doubled, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            graph.capture_begin()
            doubled.mul_(2)
            self.begun.set()
            self.end.wait()
            try:
                graph.capture_end()
            except RuntimeError as error:
                self.error = error
                # torch 2.11 takes the generator for one that a capture uses, for ever.
                generator = torch.cuda.default_generators[0]
                generator.graphsafe_set_state(generator.graphsafe_get_state().clone_state())


@MODES
def test_a_step_that_needs_no_new_memory_runs_while_another_thread_captures(mode):
    pipe, model, plain = make(mode)
    x, y = batch()
    with pipe:
        for _ in range(4):
            check_step(pipe, model, plain, x, y)
        torch.cuda.synchronize()
        model.zero_grad()
        with Capture() as other:
            pipe.step(x, target=y)
        assert other.error is None
        for name, grad in gradients(model).items():
            torch.testing.assert_close(grad, gradients(plain)[name], rtol=1e-4, atol=1e-6)


def test_a_step_that_a_capture_refuses_memory_says_what_to_do_and_the_next_step_is_right():
    pipe, model, plain = make(LANES)
    x, y = batch()
    with pipe:
        check_step(pipe, model, plain, x, y)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        with (
            Capture(),
            pytest.raises(pe.DeviceError, match='captur.*capture_error_mode="thread_local"') as found,
        ):
            pipe.step(torch.cat([x] * 64), target=torch.cat([y] * 64))
        assert "every .grad of the model is None" in str(found.value)
        assert all(p.grad is None for p in model.parameters())
        for _ in range(2):
            check_step(pipe, model, plain, x, y)


def test_a_capture_that_follows_the_advice_and_a_step_do_not_see_each_other():
    pipe, model, plain = make(LANES)
    x, y = batch()
    doubled, graph = torch.ones(3, device="cuda"), torch.cuda.CUDAGraph()
    begun, end = threading.Event(), threading.Event()

    def capture():
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            doubled.mul_(2)
            begun.set()
            end.wait()

    thread = threading.Thread(target=capture)
    with pipe:
        torch.cuda.synchronize()
        thread.start()
        begun.wait()
        pipe.step(x, target=y)
        end.set()
        thread.join()
        check_step(pipe, model, plain, x, y)
    graph.replay()
    assert doubled.tolist() == [2, 2, 2]


@pytest.mark.parametrize("call", ["step", "eval", "verify"])
def test_a_call_inside_the_callers_capture_is_refused(call):
    pipe, model, plain = make(LANES)
    x, y = batch()
    more = {} if call == "eval" else {"target": y}
    with pipe:
        check_step(pipe, model, plain, x, y)
        torch.cuda.synchronize()
        with pytest.raises(pe.InvalidArgument, match="is being captured.*outside of"):
            with torch.cuda.graph(torch.cuda.CUDAGraph()):
                getattr(pipe, call)(x, **more)
        check_step(pipe, model, plain, x, y)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_capture_on_a_device_that_is_not_the_current_one_is_seen():
    pipe, _, _ = make({"devices": ["cuda:0", "cuda:1"] * 2})
    x, y = batch()
    with pipe:
        pipe.step(x, target=y)
        torch.cuda.synchronize()
        with pytest.raises(pe.InvalidArgument, match="is being captured"):
            with torch.cuda.device(1), torch.cuda.graph(torch.cuda.CUDAGraph()):
                with torch.cuda.device(0):
                    pipe.step(x, target=y)
        pipe.step(x, target=y)
