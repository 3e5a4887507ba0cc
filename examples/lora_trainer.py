"""LoRA fine-tuning with transformers' Trainer as a pipeline, in one process or in two:

    python examples/lora_trainer.py
    torchrun --nproc-per-node 2 examples/lora_trainer.py

The weights are random, the model tiny; nothing is downloaded. The adapter is saved under runs/lora.
"""

import sys

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from pipeline_ext.transformers import PipelineTrainer

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}


def main(folder: str = "runs/lora") -> PipelineTrainer:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, **SIZES))
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    rows = torch.randint(SIZES["vocab_size"], (32, 16))
    data = [{"input_ids": row, "labels": row} for row in rows]
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=8,
        num_train_epochs=4,
        learning_rate=1e-2,
        logging_steps=4,
        eval_strategy="epoch",
        report_to=[],
    )
    trainer = PipelineTrainer(
        model, args, train_dataset=data, eval_dataset=data[:8], num_stages=2, microbatches=4
    )
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
