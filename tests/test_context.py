"""The caller's thread state reaches the threads that run stages."""

import threading

import pytest
import torch
import torch.nn.functional as F
from models import chain
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe


class Probe(nn.Module):
    """Notes what ``look()`` says in each forward."""

    def __init__(self, look):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.look = look
        self.seen = []

    def forward(self, x):
        self.seen.append(self.look())
        return self.linear(x)


def seen(look, caller, count=2):
    """What ``look`` finds on worker threads when ``caller()`` is the context of the call."""
    stages = [Probe(look) for _ in range(2)]
    x = torch.randn(4, 4)
    found = []
    with pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss) as pipe:
        for context in (caller(), None, caller()):
            if context is None:
                pipe.step(x, target=x)
            else:
                with context:
                    pipe.step(x, target=x)
            found.append({value for stage in stages for value in stage.seen})
            for stage in stages:
                stage.seen.clear()
    return found


def test_intra_op_threads():
    class Threads:
        def __enter__(self):
            torch.set_num_threads(2)

        def __exit__(self, *_):
            torch.set_num_threads(1)

    assert seen(torch.get_num_threads, Threads) == [{2}, {1}, {2}]


def test_one_and_two_intra_op_threads_each_equal_their_reference():
    # Layer norm's backward sums in another order with two threads: the case is not vacuous.
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.LayerNorm(64))
    x, y = torch.randn(4096, 64), torch.randn(4096, 64)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        plain = twin(model)
        reference_step(plain, x, y, 2, F.mse_loss)
        with pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss) as pipe:
            for _ in range(5):
                model.zero_grad()
                pipe.step(x, target=y)
                assert_same_gradients(model, gradients(plain))
        results.append(gradients(plain))
    one, two = results
    assert any(not torch.equal(one[name], two[name]) for name in one)


def test_autocast_dtype():
    def look():
        enabled = torch.is_autocast_enabled("cpu")
        return torch.get_autocast_dtype("cpu") if enabled else None

    def caller():
        return torch.autocast("cpu", dtype=torch.bfloat16)

    assert seen(look, caller) == [{torch.bfloat16}, {None}, {torch.bfloat16}]


def test_default_device():
    def make():
        return torch.empty(1).device.type

    assert seen(make, lambda: torch.device("meta")) == [{"meta"}, {"cpu"}, {"meta"}]


@pytest.mark.parametrize("overlap", [False, True])
def test_gradients_under_bf16_autocast(overlap):
    model, x, y = chain(), torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    for a, b in zip(x.tensor_split(4), y.tensor_split(4)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.mse_loss(plain(a), b) * (len(a) / 9)
        loss.backward()
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, overlap=overlap) as pipe:
        for _ in range(5):
            model.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                pipe.step(x, target=y)
            assert_same_gradients(model, gradients(plain))
            assert model[0].weight.grad.dtype == torch.float32


def test_thread_locals_last_from_task_to_task_and_step_to_step():
    local = threading.local()

    def look():
        local.count = getattr(local, "count", 0) + 1
        return local.count

    stages = [Probe(look), Probe(look)]
    with pe.Pipeline(stages, microbatches=3, loss_fn=F.mse_loss) as pipe:
        for _ in range(2):
            pipe.step(torch.randn(6, 4), target=torch.randn(6, 4))
    assert [stage.seen for stage in stages] == [[1, 2, 3, 4, 5, 6]] * 2


def test_torch_profiler_records_all_ranks_operations():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Sigmoid())
    x = torch.randn(6, 4)
    with pe.Pipeline(model, 2, 3, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=x)
        for _ in range(2):
            # Without it, torch.profiler records the thread that started it and no other.
            everywhere = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
            cpu = [torch.profiler.ProfilerActivity.CPU]
            with torch.profiler.profile(activities=cpu, experimental_config=everywhere) as profile:
                pipe.step(x, target=x)
            counts = {event.key: event.count for event in profile.key_averages()}
            assert counts["aten::tanh"] == 3
            assert counts["aten::sigmoid"] == 3
            assert counts["aten::tanh_backward"] == 3
        pipe.step(x, target=x)


def test_step_needs_grad_mode():
    with pe.Pipeline([nn.Linear(4, 4)], microbatches=1, loss_fn=F.mse_loss) as pipe:
        x = torch.randn(2, 4)
        for off in (torch.no_grad, torch.inference_mode):
            with off():
                with pytest.raises(pe.InvalidArgument, match="no_grad"):
                    pipe.step(x, target=x)
                assert pipe.eval(x).shape == (2, 4)
        pipe.step(x, target=x)
