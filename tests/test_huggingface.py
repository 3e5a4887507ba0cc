"""Models of transformers as pipelines, with the gradients of plain autograd."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trainers import LENGTH, WORDS, gpt2, llama, lora

import pipeline_ext as pe

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import huggingface
import lora_trainer
from transformers import BatchEncoding

ROWS, COUNT = 8, 4


def batch(masked=False):
    """Every row has as many labels, so that the mean of the microbatches' means is the batch's."""
    ids = torch.randint(WORDS, (ROWS, LENGTH))
    mask = torch.ones_like(ids)
    if masked:
        mask[::2, :3] = 0
    labels = ids.clone()
    labels[:, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def pipeline(model, sample=None, **options):
    return pe.Pipeline(model, num_stages=2, microbatches=COUNT, sample=sample, **options)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same_step(model, inputs, rtol=1e-4, atol=1e-6, **options):
    """A step has the loss and the gradients of the model itself."""
    loss = model(**inputs).loss
    loss.backward()
    expected = gradients(model)
    with pipeline(model, inputs, **options) as pipe:
        found = pipe.step(**inputs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, loss.detach(), rtol=rtol, atol=atol)
    torch.testing.assert_close(gradients(model), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("make", [gpt2, llama])
def test_attention_with_padding_and_labels(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    assert_same_step(model, batch(masked=True))


def test_the_adapters_of_a_peft_model_are_trained():
    model = lora()
    nn.init.normal_(model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    assert_same_step(model, batch())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    model = llama()
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_same_step(model, batch())


def test_parts_of_a_sum_that_is_divided_by_the_items_of_the_batch_are_added():
    inputs = batch()
    inputs["labels"][:3, :7] = -100  # rows have different numbers of labels
    items = (inputs["labels"][:, 1:] != -100).sum()
    assert_same_step(llama(), inputs | {"num_items_in_batch": items}, loss_reduction="sum")


def test_a_batch_encoding():
    model, inputs = llama(), batch()
    loss = model(**inputs).loss
    with pipeline(model) as pipe:
        torch.testing.assert_close(pipe.step(**BatchEncoding(inputs)), loss.detach())


class Takes(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, encoding):
        return self.model(**encoding)


def test_a_batch_encoding_positionally():
    model, inputs = Takes(llama()), batch()
    loss = model(BatchEncoding(inputs)).loss
    with pipeline(model) as pipe:
        with pytest.raises(pe.InvalidArgument, match="BatchEncoding"):
            pipe.step(BatchEncoding(inputs))
        torch.testing.assert_close(pipe.step(BatchEncoding(inputs).data), loss.detach())


def test_a_model_in_bfloat16():
    assert_same_step(llama().to(torch.bfloat16), batch(), rtol=5e-2, atol=5e-3)


def test_autocast_around_the_step():
    model, inputs = llama(), batch()
    with torch.autocast("cpu", torch.bfloat16):
        assert_same_step(model, inputs, rtol=5e-2, atol=5e-3)


def train(model, step, clip, inputs):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 1 / (n + 1))
    losses = []
    for _ in range(3):
        losses.append(step(**inputs).item())
        losses.append(clip(0.5).item())
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return losses


def test_a_loop_with_clipping_and_a_scheduler():
    model, inputs = gpt2(), batch()
    plain = copy.deepcopy(model)

    def plain_step(**inputs):
        loss = plain(**inputs).loss
        loss.backward()
        return loss.detach()

    expected = train(plain, plain_step, lambda n: nn.utils.clip_grad_norm_(plain.parameters(), n), inputs)
    with pipeline(model) as pipe:
        assert train(pipe, pipe.step, pipe.clip_grad_norm_, inputs) == pytest.approx(expected, rel=1e-5)


def test_a_gradient_scaler():
    model, inputs = llama(), batch()
    model(**inputs).loss.backward()
    expected = gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pipeline(model, scaler=scaler) as pipe:
        pipe.step(**inputs)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_modes_of_the_model_are_followed_after_cutting():
    model, inputs = gpt2(), batch()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    model.eval()
    model(**inputs).loss.backward()
    expected = gradients(model)
    model.train()
    with pipeline(model, inputs) as pipe:
        pipe.step(**inputs)
        assert any(not torch.allclose(a, expected[name], rtol=1e-2) for name, a in gradients(model).items())
        model.eval()
        pipe.step(**inputs)
        torch.testing.assert_close(gradients(model), expected, rtol=1e-4, atol=1e-6)


def test_the_model_generates_and_is_saved_at_any_time(tmp_path):
    model, inputs = llama(), batch()
    expected = model.generate(inputs["input_ids"][:, :4], max_length=8)
    with pipeline(model, inputs) as pipe:
        pipe.step(**inputs)
        assert torch.equal(model.generate(inputs["input_ids"][:, :4], max_length=8), expected)
        model.save_pretrained(tmp_path)
        pipe.zero_grad()
        assert gradients(model) == {}
    saved = type(model).from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in pipe.state_dict().items())


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen2"])
def test_the_example_trains(name):
    losses = huggingface.main(name, steps=3)
    assert losses[-1] < losses[0]


def test_the_example_of_lora_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = lora_trainer.main("lora")
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert (tmp_path / "lora" / "adapter_model.safetensors").exists()
