"""Tiny models of transformers, data, and trainings of them by Trainer and by PipelineTrainer."""

import pytest
import torch
from torch import nn

pytest.importorskip("transformers", reason="needs transformers, of the extra `hf`")
pytest.importorskip("accelerate", reason="needs accelerate, of the extra `hf`")

from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    TrainingArguments,
)
from transformers.modeling_outputs import TokenClassifierOutput

from pipeline_ext.transformers import PipelineTrainer

WORDS, LENGTH = 64, 10


class Tagger(nn.Module):
    """Accepts ``num_items_in_batch`` and does not look at it, as some models do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 3)]
        )

    def forward(self, input_ids, labels=None, **kwargs):
        logits = input_ids
        for layer in self.layers:
            logits = layer(logits)
        loss = None
        if labels is not None:
            tags = torch.where(labels < 0, labels, labels % 3)
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), tags.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


def gpt2():
    """Its head is tied to its embedding."""
    sizes = {"n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": LENGTH}
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, bos_token_id=0, eos_token_id=0, **sizes, **no_dropout))


def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes))


def lora():
    peft = pytest.importorskip("peft", reason="needs peft, of the extra `test`")
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return peft.get_peft_model(llama(), config)


MODELS = {"gpt2": gpt2, "llama": llama, "lora": lora, "tagger": Tagger}


def examples(count=11):
    """Rows with different numbers of labels of -100, and padding."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for row in range(count):
        ids = torch.randint(WORDS, (LENGTH,), generator=generator)
        labels = ids.clone()
        labels[: row % 6] = -100
        found.append(
            {"input_ids": ids, "attention_mask": (torch.arange(LENGTH) >= row % 3).long(), "labels": labels}
        )
    return found


def trainer(cls, name, folder, rows=11, **options):
    """A trainer of the model with this name; options of TrainingArguments and of the trainer."""
    torch.manual_seed(0)
    model = MODELS[name]() if isinstance(name, str) else name
    own = (
        "num_stages",
        "microbatches",
        "pipeline_options",
        "compute_loss_func",
        "compute_metrics",
        "train_dataset",
    )
    given = {key: options.pop(key) for key in own if key in options}
    if issubclass(cls, PipelineTrainer):
        given = {"num_stages": 2, "microbatches": 4} | given
    settings = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    } | options
    args = TrainingArguments(output_dir=str(folder), **settings)
    data = given.pop("train_dataset", examples(rows))
    return cls(model, args, train_dataset=data, eval_dataset=examples(6), **given)


def history(trained):
    """What a training logged, without times."""
    kept = ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_sum", "train_loss", "epoch")
    return [{key: entry[key] for key in kept if key in entry} for entry in trained.state.log_history]


def assert_same_history(ours, theirs, rel=2e-6):
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs):
        assert a == pytest.approx(b, rel=rel, abs=1e-7)
