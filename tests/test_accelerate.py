"""Accelerate beside a pipeline: what works, and what is refused in a sentence that says what to do."""

import copy
import pickle

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.utils.data import DataLoader
from trainers import LENGTH, WORDS, llama

import pipeline_ext as pe


@pytest.fixture(params=["no", "bf16"])
def accelerator(request):
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision=request.param)
    AcceleratorState._reset_state(reset_partial_state=True)


def loader():
    rows = torch.randint(WORDS, (12, LENGTH), generator=torch.Generator().manual_seed(0))
    return DataLoader([{"input_ids": row, "labels": row} for row in rows], batch_size=4)


def test_optimizer_loader_and_scheduler_are_prepared_beside_it(accelerator):
    plain, model = llama(), llama()
    plain.load_state_dict(model.state_dict())
    histories = []
    for trained, as_pipeline in ((plain, False), (model, True)):
        trained = accelerator.prepare_model(trained, evaluation_mode=True)
        pipe = pe.Pipeline(trained, num_stages=2, microbatches=4) if as_pipeline else None
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
        optimizer, data, scheduler = accelerator.prepare(optimizer, loader(), scheduler)
        losses = []
        for batch in data:
            if pipe is None:
                loss = trained(**batch).loss
                accelerator.backward(loss)
            else:
                loss = pipe.step(**batch)
            assert loss.dtype == torch.float32
            losses.append((loss.item(), optimizer.param_groups[0]["lr"]))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        histories.append(losses)
    rel = 1e-5 if accelerator.mixed_precision == "no" else 5e-3
    for ours, theirs in zip(*reversed(histories)):
        assert ours == pytest.approx(theirs, rel=rel)


def test_gradients_of_a_prepared_model_are_those_without_a_pipeline(accelerator):
    model = accelerator.prepare(llama())
    (batch, *_) = loader()
    model(**batch).loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    with pe.Pipeline(model, num_stages=2, microbatches=4) as pipe:
        pipe.step(**batch)
    rtol, atol = (1e-4, 1e-6) if accelerator.mixed_precision == "no" else (5e-2, 1e-3)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=rtol, atol=atol, msg=name)


@pytest.fixture
def pipe():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    with pe.Pipeline(model, num_stages=2, microbatches=2, loss_fn=nn.functional.mse_loss) as made:
        yield made


X, Y = torch.randn(4, 4), torch.randn(4, 2)


def test_a_pipeline_is_not_prepared(accelerator, pipe):
    with pytest.raises(pe.PipelineError, match="prepare the optimizer, the data loader and the"):
        accelerator.prepare(pipe)
    optimizer = accelerator.prepare(torch.optim.SGD(pipe.parameters()))
    assert isinstance(pipe, pe.Pipeline) and not isinstance(pipe, nn.Module)
    assert pipe.__class__ is pe.Pipeline and type(optimizer).__name__ == "AcceleratedOptimizer"


@pytest.mark.parametrize(
    "backward",
    [
        lambda accelerator, loss: loss.backward(),
        lambda accelerator, loss: accelerator.backward(loss),
        lambda accelerator, loss: torch.amp.GradScaler("cpu").scale(loss).backward(),
    ],
)
def test_a_second_backward_of_a_step_says_that_there_was_one(accelerator, pipe, backward):
    loss = pipe.step(X, target=Y)
    before = [p.grad.clone() for p in pipe.parameters()]
    with pytest.raises(pe.PipelineError, match="step has run the backward already.*leave out loss.backward()"):
        backward(accelerator, loss)
    assert all(torch.equal(p.grad, grad) for p, grad in zip(pipe.parameters(), before))


def test_a_loss_is_otherwise_a_plain_tensor(pipe):
    loss = pipe.step(X, target=Y)
    plain = torch.tensor(loss.item())
    others = (
        loss + 1,
        torch.stack([loss]),
        copy.deepcopy(loss),
        pickle.loads(pickle.dumps(loss)),
        loss.clone(),
    )
    assert all(type(other) is torch.Tensor for other in others)
    assert (repr(loss), f"{loss:.3f}", str(loss)) == (repr(plain), f"{plain:.3f}", str(plain))
    assert isinstance(loss, torch.Tensor) and not loss.requires_grad and loss / 2 == plain / 2


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda pipe: pipe.train(), "call train\\(\\) or eval\\(\\) of the model"),
        (lambda pipe: pipe(X), "pipe.step.* runs a batch forward and backward .* pipe.eval"),
        (lambda pipe: pipe.to("cpu"), "give devices= to Pipeline"),
        (lambda pipe: pipe.cuda(), "give devices= to Pipeline"),
        (lambda pipe: pipe.half(), "cast the model before it is given to Pipeline, or .* torch.autocast"),
    ],
)
def test_what_is_called_as_on_a_module_says_what_to_call(pipe, call, said):
    with pytest.raises(pe.PipelineError, match=said):
        call(pipe)
    assert not hasattr(pipe, "train") and not hasattr(pipe, "to")


def test_what_it_says_is_done():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2)).to(torch.bfloat16)
    with pe.Pipeline(model, 2, 2, loss_fn=nn.functional.mse_loss, devices=["cpu"] * 2) as pipe:
        model.eval()
        assert torch.equal(pipe.eval(X.bfloat16(), keep_mode=True), model(X.bfloat16()))
        assert pipe.step(X.bfloat16(), target=Y.bfloat16()) == pipe.step(X.bfloat16(), target=Y.bfloat16())
        pipe.zero_grad()
        assert all(p.grad is None for p in model.parameters())
