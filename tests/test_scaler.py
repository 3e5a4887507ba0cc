"""Pipeline(scaler=): losses are scaled before the backward, as in a plain loop."""

import models
import pytest
import torch
import torch.nn.functional as F
from reference import assert_same_gradients, gradients, split, twin
from torch.amp import GradScaler

import pipeline_ext as pe

ROWS, WIDTH, COUNT = 8, 12, 4


def batches(count=4):
    return [(torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)) for _ in range(count)]


def scaler(**options):
    return GradScaler("cpu", init_scale=2.0**10, growth_interval=2, **options)


def pipeline(model, **options):
    return pe.Pipeline(model, 2, COUNT, loss_fn=F.mse_loss, **options)


def step_of(pipe):
    return lambda x, y: pipe.step(x, target=y)


def plain_step(model, x, y, its_scaler):
    """As users write it; returns the total loss."""
    total = 0
    for a, b in zip(split(x, COUNT), split(y, COUNT)):
        loss = F.mse_loss(model(a), b) * (len(a) / len(x))
        its_scaler.scale(loss).backward()
        total = total + loss.detach()
    return total


def train(model, step, its_scaler, data, clip=None):
    """A plain loop's outer half; returns losses and the scale after each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    seen = []
    for x, y in data:
        optimizer.zero_grad()
        loss = step(x, y)
        if clip is not None:
            its_scaler.unscale_(optimizer)
            clip(0.1)
        its_scaler.step(optimizer)
        its_scaler.update()
        seen.append((loss.item(), its_scaler.get_scale()))
    return seen


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_gradients_are_scaled_and_the_loss_is_not(schedule):
    model = models.chain()
    plain, its_scaler = twin(model), scaler()
    x, y = batches(1)[0]
    expected = plain_step(plain, x, y, its_scaler)
    with pipeline(model, scaler=scaler(), schedule=schedule) as pipe:
        assert torch.equal(pipe.step(x, target=y), expected)
    assert_same_gradients(model, gradients(plain))
    unscaled = twin(plain)
    plain_step(unscaled, x, y, scaler(enabled=False))
    for scaled, plain in zip(model.parameters(), unscaled.parameters()):
        torch.testing.assert_close(scaled.grad, plain.grad * 2**10)


@pytest.mark.parametrize("clipped", [False, True])
def test_a_loop_with_a_scaler_is_the_plain_loop(clipped):
    model = models.chain()
    plain, data = twin(model), batches()
    ours, theirs = scaler(), scaler()
    expected = train(
        plain,
        lambda x, y: plain_step(plain, x, y, theirs),
        theirs,
        data,
        (lambda most: torch.nn.utils.clip_grad_norm_(plain.parameters(), most)) if clipped else None,
    )
    with pipeline(model, scaler=ours) as pipe:
        assert train(model, step_of(pipe), ours, data, pipe.clip_grad_norm_ if clipped else None) == expected
    assert all(map(torch.equal, model.parameters(), plain.parameters()))
    assert ours.state_dict() == theirs.state_dict()
    assert ours.get_scale() == 2.0**12  # it has grown after every second step


def test_a_step_whose_gradients_overflow_is_skipped_and_the_scale_falls():
    model = models.chain()
    data = batches(2)
    data[0][0][0, 0] = torch.inf
    before = [p.clone() for p in model.parameters()]
    ours = scaler()
    with pipeline(model, scaler=ours) as pipe:
        train(model, step_of(pipe), ours, data[:1])
        assert all(map(torch.equal, model.parameters(), before))
        assert ours.get_scale() == 2.0**9
        train(model, step_of(pipe), ours, data[1:])
    assert not any(map(torch.equal, model.parameters(), before))


def test_losses_of_low_precision_are_scaled_in_their_type():
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = models.chain()
        plain, its_scaler = twin(model), scaler()
        x, y = torch.randn(6, WIDTH), torch.randn(6, WIDTH)  # uneven: weights are no powers of two
        plain_step(plain, x, y, its_scaler)
        with pipeline(model, scaler=scaler()) as pipe:
            pipe.step(x, target=y)
        assert_same_gradients(model, gradients(plain))
    finally:
        torch.set_default_dtype(torch.float32)


def test_losses_of_several_stages_are_scaled_alike():
    class WithNorm(torch.nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            return pe.WithLoss(y, y.square().mean())

    stages = [WithNorm(WIDTH, WIDTH), torch.nn.Linear(WIDTH, WIDTH)]
    same = [twin(stage) for stage in stages]
    x, y = batches(1)[0]
    with pe.Pipeline(stages, None, COUNT, loss_fn=F.mse_loss, scaler=scaler()) as pipe:
        pipe.step(x, target=y)
    with pe.Pipeline(same, None, COUNT, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
    for scaled, plain in zip(stages, same):
        torch.testing.assert_close(scaled.weight.grad, plain.weight.grad * 2**10)


def test_learning_rate_schedulers_and_several_steps_before_an_update_work_as_always():
    model = models.chain()
    plain, data = twin(model), batches(6)

    def accumulate(model, step):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=3)
        for number, (x, y) in enumerate(data):
            step(x, y)
            if number % 2:
                optimizer.step()
                rates.step()
                optimizer.zero_grad()

    off = scaler(enabled=False)
    accumulate(plain, lambda x, y: plain_step(plain, x, y, off))
    with pipeline(model) as pipe:
        accumulate(pipe, step_of(pipe))
    assert all(map(torch.equal, model.parameters(), plain.parameters()))


def test_what_cannot_be_used_is_refused():
    model = models.chain()
    with pytest.raises(pe.InvalidArgument, match="scaler is 1024; give a GradScaler"):
        pipeline(model, scaler=1024)
    with pytest.raises(pe.InvalidArgument, match="call scaler.step"):
        pipeline(model, scaler=scaler(), optimizer=torch.optim.SGD(model.parameters()))
