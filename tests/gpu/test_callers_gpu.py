"""What callers do around steps on GPUs: memory used again at once, other streams, threads, optimizers, eval."""

import copy
import functools
import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from gpu_cases import MODES, on_ranks
from reference import reference_step
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS == 0, reason="torch sees no CUDA device"),
]

STEPS = 5  # the third is captured
CYCLES = 20_000_000  # of torch.cuda._sleep: about 10 ms


@pytest.fixture(params=MODES)
def mode(request):
    if request.param == "two devices" and GPUS < 2:
        pytest.skip(f"needs two GPUs, and torch sees {GPUS}")
    return on_ranks(request.param, 4)


def blocks():
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64)) for _ in range(4)))


def batch():
    return torch.randn(32, 64), torch.randn(32, 64)


def pipeline(model, mode, **options):
    return pe.Pipeline(model, 4, 8, loss_fn=F.mse_loss, **{"trace": False, **mode, **options})


def plain_step(plain, x, y):
    plain.zero_grad()
    return reference_step(plain, x, y, 8, F.mse_loss).item()


def assert_like(model, plain):
    for (name, found), expected in zip(model.named_parameters(), plain.parameters()):
        difference = (found.grad.cpu() - expected.grad).abs().max()
        assert difference <= 1e-4 * expected.grad.abs().max(), name


def check_steps(mode, make=lambda tensor: tensor, after=lambda x, y: None, later=lambda: None, count=STEPS):
    """Steps on inputs that ``make`` makes of tensors of the CPU.

    ``after`` does with them what it likes; ``later`` is called when they are gone.
    """
    model = blocks()
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        for _ in range(count):
            x, y = batch()
            expected = plain_step(plain, x, y)
            model.zero_grad()
            given, target = make(x), make(y)
            loss = pipe.step(given, target=target)
            after(given, target)
            del given, target
            later()
            assert loss.item() == pytest.approx(expected, rel=1e-4)
            assert_like(model, plain)


def spoil(*tensors):
    for tensor in tensors:
        tensor.fill_(float("nan"))


def test_inputs_on_the_gpu_may_be_overwritten_at_once(mode):
    check_steps(mode, lambda t: t.cuda(), spoil)


def test_inputs_on_the_gpu_may_be_freed_and_their_memory_used_again(mode):
    def use_again():
        junk = [torch.full((32, 64), float("nan"), device=f"cuda:{i % GPUS}") for i in range(50)]
        del junk

    check_steps(mode, lambda t: t.cuda(), later=use_again)


def test_pageable_inputs_may_be_overwritten_at_once(mode):
    check_steps(mode, lambda t: t.clone(), spoil)


def test_the_caller_may_be_on_a_stream_of_its_own(mode):
    with torch.cuda.stream(torch.cuda.Stream()):
        check_steps(mode, lambda t: t.cuda())


def test_a_step_waits_for_inputs_that_are_still_being_made(mode):
    def late(tensor):
        made = torch.full_like(tensor, float("nan"), device="cuda")
        torch.cuda._sleep(CYCLES)
        return made.copy_(tensor)

    check_steps(mode, late)


def test_gradients_may_be_set_to_zero_in_place(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        for _ in range(STEPS + 1):
            x, y = batch()
            plain_step(plain, x, y)
            pipe.step(x, target=y)
            kept = [p.grad.clone() for p in model.parameters()]
            model.zero_grad(set_to_none=False)
            for found, p in zip(kept, plain.parameters()):
                assert (found.cpu() - p.grad).abs().max() <= 1e-4 * p.grad.abs().max()


def test_an_optimizer_and_the_next_step_follow_at_once(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain))
    with pipeline(model, mode) as pipe:
        losses, expected = [], []
        for _ in range(STEPS + 3):
            x, y = batch()
            expected.append(plain_step(plain, x, y))
            theirs.step()
            ours.zero_grad()
            losses.append(pipe.step(x, target=y))
            ours.step()
        assert [loss.item() for loss in losses] == pytest.approx(expected, rel=1e-3)


def test_eval_between_steps(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        for _ in range(STEPS):
            x, y = batch()
            plain_step(plain, x, y)
            model.zero_grad()
            pipe.step(x, target=y)
            out = pipe.eval(x) * 2
            assert torch.allclose(out.cpu(), 2 * plain(x), atol=1e-4)
            assert_like(model, plain)


def test_steps_of_another_thread(mode):
    raised = []

    def run():
        try:
            check_steps(mode)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_another_device_may_be_current(mode):
    with torch.cuda.device(1):
        check_steps(mode)


def test_outputs_and_losses_are_the_callers_own(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        kept = []
        for _ in range(STEPS):
            x, y = batch()
            losses = []
            _, out = pipe.step(x, target=y, losses=losses, return_outputs=True)
            kept.append((x, y, out, losses))
        for x, y, out, losses in kept:
            assert torch.allclose(out.cpu(), plain(x), atol=1e-4)
            mean = sum(loss.item() for loss in losses) / 8
            assert mean == pytest.approx(F.mse_loss(plain(x), y).item(), rel=1e-4)


class Drops(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def inner(self, x):
        return F.dropout(x, 0.5) * self.scale

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def test_a_checkpoint_with_dropout_draws_the_same_again(mode):
    model = nn.Sequential(Drops(), nn.Identity(), Drops(), nn.Identity())
    with pe.Pipeline(model, 4, 8, loss_fn=lambda out, _: out.sum(), trace=False, **mode) as pipe:
        for _ in range(STEPS):
            model.zero_grad()
            x = torch.rand(32, 64)
            loss = pipe.step(x, target=x).item()
            for p in model.parameters():  # the loss is linear in each
                assert p.grad.item() == pytest.approx(loss, rel=1e-3)


def test_a_scaler_unscales_what_it_scaled(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    ours, theirs = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0)
    with pipeline(model, mode, scaler=scaler) as pipe:
        for _ in range(STEPS):
            x, y = batch()
            plain_step(plain, x, y)
            theirs.step()
            ours.zero_grad()
            pipe.step(x, target=y)
            scaler.step(ours)
            scaler.update()
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.allclose(p.cpu(), q, atol=1e-4)


def test_a_pipeline_may_be_closed_while_its_steps_run(mode):
    def use():
        model = blocks()
        pipe = pipeline(model, mode)
        for _ in range(3):
            pipe.step(*batch()[:1], target=batch()[1])
        pipe.close()

    use()
    torch.cuda.synchronize()
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        use()
        gc.collect()
        torch.cuda.empty_cache()
    torch.cuda.synchronize()
    gc.collect()
    assert torch.cuda.memory_allocated() == before


def test_a_state_dict_after_an_optimizers_step_is_that_steps(mode):
    model = blocks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pipeline(model, mode) as pipe:
        for _ in range(STEPS):
            optimizer.zero_grad()
            x, y = batch()
            pipe.step(x, target=y)
            optimizer.step()
            at_once = {name: value.cpu() for name, value in model.state_dict().items()}
            torch.cuda.synchronize()
            assert all(torch.equal(at_once[name], value.cpu()) for name, value in model.state_dict().items())


def test_gradients_of_the_inputs(mode):
    model = blocks()
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        for _ in range(STEPS):
            x, y = batch()
            given, expected = x.cuda().requires_grad_(), x.clone().requires_grad_()
            plain_step(plain, expected, y)
            pipe.step(given, target=y)
            assert torch.allclose(given.grad.cpu(), expected.grad, rtol=1e-4, atol=1e-7)


def test_two_pipelines_in_turn_and_from_two_threads(mode):
    def steps(raised):
        try:
            check_steps(mode, count=3)
        except BaseException as error:
            raised.append(error)

    raised = []
    threads = [threading.Thread(target=steps, args=(raised,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("policy", ["raise", "skip"])
def test_a_step_that_is_not_finite_is_named_and_dropped(mode, policy):
    model = blocks()
    if mode.get("graphs"):
        with pytest.raises(pe.InvalidArgument, match="graphs=True do not go together"):
            pipeline(model, mode, nonfinite=policy)
        return
    plain = copy.deepcopy(model)
    told = r"the result of stage 0 for microbatch 2 \(as its input is already\) is not finite"
    expects = {
        "raise": functools.partial(pytest.raises, pe.NonFiniteError, match=told),
        "skip": functools.partial(pytest.warns, UserWarning, match=told),
    }[policy]
    with pipeline(model, mode, nonfinite=policy) as pipe:
        for spoilt in (False, True, False, True):
            x, y = batch()
            model.zero_grad()
            if spoilt:
                x[9, 3] = float("inf")
                with expects():
                    pipe.step(x, target=y)
                assert all(p.grad is None for p in model.parameters())
            else:
                plain_step(plain, x, y)
                pipe.step(x, target=y)
                assert_like(model, plain)


class Hog(nn.Module):
    """Takes, when told to, more memory than there is."""

    def __init__(self):
        super().__init__()
        self.hungry = False

    def forward(self, x):
        if self.hungry:
            torch.empty(2**60, dtype=torch.uint8, device=x.device)
        return x * 1.0


@pytest.mark.parametrize("when", [1, 2, 4])
def test_after_a_step_that_found_no_memory_the_next_one_is_right(mode, when):
    hog = Hog()
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(3)), nn.Sequential(hog, nn.Linear(64, 64)))
    plain = copy.deepcopy(model)
    with pipeline(model, mode) as pipe:
        for step in range(STEPS + 2):
            x, y = batch()
            expected = plain_step(plain, x, y)
            model.zero_grad()
            hog.hungry = step == when
            if hog.hungry and not replays(pipe):
                with pytest.raises(pe.StageError, match="out of memory|Tried to allocate"):
                    pipe.step(x, target=y)
                assert all(p.grad is None for p in model.parameters())
                continue
            hog.hungry = False
            assert pipe.step(x, target=y).item() == pytest.approx(expected, rel=1e-4)
            assert_like(model, plain)


def replays(pipe):
    """Whether the next step runs no Python of the model's."""
    return pipe.graph is not None and pipe.graph.captured > 0
