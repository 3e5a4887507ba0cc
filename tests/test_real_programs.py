"""The engine inside programs as people write them: loaders, forks, threads, many pipelines."""

import gc
import multiprocessing
import os
import threading
import traceback

import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn
from torch.utils.data import DataLoader, Dataset

import pipeline_ext as pe

WAIT = 120  # seconds, of a busy machine


class Rows(Dataset):
    """Rows of numbers that depend on the index alone."""

    def __len__(self):
        return 32

    def __getitem__(self, index):
        made = torch.Generator().manual_seed(index)
        return torch.randn(8, generator=made), torch.randn(8, generator=made)


def make_model():
    return nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8))


def make_pipeline(model, **options):
    return pe.Pipeline(model, num_stages=2, microbatches=4, loss_fn=F.mse_loss, **options)


def check_step(pipe, model, x, y):
    """A step gives plain autograd's loss and gradients."""
    plain = twin(model)
    expected = reference_step(plain, x, y, pipe.microbatches, F.mse_loss)
    model.zero_grad()
    assert torch.equal(pipe.step(x, target=y), expected)
    assert_same_gradients(model, gradients(plain))


@pytest.mark.parametrize("made", ["before", "after"])
@pytest.mark.parametrize(
    "start",
    [
        "fork",
        pytest.param(
            "spawn", marks=pytest.mark.every
        ),  # whose workers import torch anew, as the forkserver does
        pytest.param("forkserver", marks=pytest.mark.every),
    ],
)
def test_workers_of_a_data_loader_made_before_or_after_the_first_step(start, made):
    model = make_model()
    with make_pipeline(model) as pipe:
        loader = DataLoader(
            Rows(), batch_size=8, num_workers=2, multiprocessing_context=start, persistent_workers=True
        )
        batches = None
        if made == "before":
            batches = iter(loader)
        check_step(pipe, model, torch.randn(8, 8), torch.randn(8, 8))
        for _ in range(2):
            seen = 0
            for x, y in batches or loader:
                check_step(pipe, model, x, y)
                seen += 1
            assert seen == 4
            batches = None


def in_a_fork(body):
    """What ``body`` raises in a forked child, as text; "" if nothing."""
    here, there = os.pipe()
    child = os.fork()
    if child == 0:
        said = ""
        try:
            body()
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(there, said.encode()[-10_000:])
            os._exit(0)
    os.close(there)
    with os.fdopen(here) as said:
        text = said.read()
    assert os.waitpid(child, 0)[1] == 0
    return text


def test_a_fork_with_the_threads_alive_makes_a_pipeline_of_its_own():
    model = make_model()
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    with make_pipeline(model) as pipe:
        check_step(pipe, model, x, y)

        def body():
            with pytest.raises(pe.DeadPipeline, match="made in another process"):
                pipe.step(x, target=y)
            with make_pipeline(model) as own:
                check_step(own, model, x, y)

        assert in_a_fork(body) == ""
        check_step(pipe, model, x, y)


def test_forks_at_any_moment_of_a_step():
    model = make_model()
    x, y = torch.randn(8, 8), torch.randn(8, 8)
    stop = threading.Event()
    failed = []

    def train():
        try:
            with make_pipeline(model) as pipe:
                while not stop.is_set():
                    check_step(pipe, model, x, y)
        except BaseException as error:
            failed.append(error)

    def body():
        own = make_model()
        with make_pipeline(own) as pipe:
            check_step(pipe, own, x, y)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            context = multiprocessing.get_context("fork")
            child = context.Process(target=body)
            child.start()
            child.join(WAIT)
            assert child.exitcode == 0
    finally:
        stop.set()
        thread.join(WAIT)
    assert not failed


def test_steps_on_a_new_thread_each_time():
    model = make_model()
    failed = []

    def step(pipe):
        try:
            check_step(pipe, model, torch.randn(8, 8), torch.randn(8, 8))
        except BaseException as error:
            failed.append(error)

    with make_pipeline(model) as pipe:
        for _ in range(20):
            thread = threading.Thread(target=step, args=[pipe])
            thread.start()
            thread.join(WAIT)
        assert not failed
        step(pipe)
        assert not failed


def test_a_pipeline_of_each_thread():
    failed = []
    x, y = torch.randn(8, 8), torch.randn(8, 8)

    def train():
        try:
            with make_pipeline(model := make_model()) as pipe:
                for _ in range(20):
                    check_step(pipe, model, x, y)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT)
    assert not failed


def used():
    """Threads, descriptors and resident bytes of this process."""
    gc.collect()
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return (
        len(os.listdir("/proc/self/task")),
        len(os.listdir("/proc/self/fd")),
        pages * os.sysconf("SC_PAGE_SIZE"),
    )


@pytest.mark.parametrize("dropped", [pytest.param("closed", marks=pytest.mark.every), "freed"])
def test_five_hundred_pipelines_leave_nothing_behind(dropped):
    def once():
        model = nn.Sequential(nn.Linear(64, 256), nn.Linear(256, 64))
        pipe = make_pipeline(model)
        pipe.step(torch.randn(8, 64), target=torch.randn(8, 64))
        if dropped == "closed":
            pipe.close()

    for _ in range(100):
        once()
    before = used()
    for _ in range(400):
        once()
    after = used()
    assert after[:2] == before[:2]
    assert after[2] - before[2] < 400 * 20_000  # the gradients of one have 130 kB
