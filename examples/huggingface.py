"""Any causal language model of transformers as a pipeline, in one process or in two:

    python examples/huggingface.py llama
    torchrun --nproc-per-node 2 examples/huggingface.py gpt2

The weights are random, the models tiny; nothing is downloaded.
"""

import sys

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

import pipeline_ext as pe

SIZES = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def main(name: str = "gpt2", steps: int = 5) -> list[float]:
    """Trains a model of the type ``name``; returns the losses."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZES, **HEADS, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.randint(config.vocab_size, (8, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    mesh = dist.group.WORLD if dist.is_initialized() else None
    losses = []
    with pe.Pipeline(model, num_stages=2, microbatches=4, sample=batch, mesh=mesh) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
        for step in range(steps):
            losses.append(pipe.step(**batch).item())
            optimizer.step()
            optimizer.zero_grad()
            print(f"step {step}: loss {losses[-1]:.4f}")
    return losses


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main(*sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
