"""A transformers GPT-2 or Llama, cut at blocks by name and trained beside the unsplit model.

In one process, or in as many as there are stages:

    python examples/huggingface.py llama
    torchrun --nproc-per-node 2 examples/huggingface.py gpt2

The weights are random, the models tiny; nothing is downloaded. In the pipeline's state a parameter's name is
the stage's number, "model", and its name in transformers: ``0.model.transformer.wte.weight``.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import pipeline_ext as pe

MICROBATCHES = 4
ROWS, LENGTH, WORDS = 8, 16, 128


class Zeros(nn.Module):
    """In place of position embeddings that have been added already."""

    def forward(self, positions: Tensor) -> Tensor:
        return torch.zeros(())


# What stands where, in the stages that lack a model's beginning or its end.
NO_BEGINNING = {"wte": None, "wpe": Zeros(), "drop": nn.Identity(), "embed_tokens": None}
NO_END = {"ln_f": nn.Identity(), "norm": nn.Identity(), "lm_head": None}


class Part(nn.Module):
    """Consecutive blocks of a causal language model, run by the model's own code.

    That makes masks and position embeddings from what it is given, so they need not travel: from part to part
    goes what the model takes instead of token ids, and the attention mask where there is one.
    """

    def __init__(self, model: PreTrainedModel, blocks: str, here: range, *, first: bool, last: bool) -> None:
        super().__init__()
        absent = ({} if first else NO_BEGINNING) | ({} if last else NO_END)
        kept = nn.ModuleList()
        for number in here:
            kept.add_module(str(number), getattr(model.base_model, blocks)[number])
        base = replaced(model.base_model, absent | {blocks: kept})
        self.model = replaced(model, absent | {model.base_model_prefix: base})
        self.last = last

    def forward(
        self, received: dict[str, Tensor] | None = None, **inputs: Tensor
    ) -> dict[str, Tensor] | Tensor:
        inputs = inputs if received is None else received
        if self.last:
            return self.model(**inputs, use_cache=False).logits
        result = self.model.base_model(**inputs, use_cache=False)
        handed_on = {"inputs_embeds": result.last_hidden_state}
        if "attention_mask" in inputs:
            handed_on["attention_mask"] = inputs["attention_mask"]
        return handed_on


def replaced(module: nn.Module, others: dict[str, nn.Module | None]) -> nn.Module:
    """A copy that shares the module's children, but for those with these names."""
    copied = copy.copy(module)
    copied._modules = {name: others.get(name, child) for name, child in module._modules.items()}
    return copied


def cut(model: PreTrainedModel, cuts: list[str]) -> list[nn.Module]:
    """The model's stages; a new one begins at each of these blocks, as in ``["transformer.h.2"]``."""
    path, _, _ = cuts[0].rpartition(".")
    starts = [0, *(int(name.rpartition(".")[2]) for name in cuts)]
    ends = [*starts[1:], len(model.get_submodule(path))]
    return [
        Part(model, path.rpartition(".")[2], range(start, end), first=start == 0, last=end == ends[-1])
        for start, end in zip(starts, ends)
    ]


def make(name: str) -> tuple[PreTrainedModel, list[str]]:
    """A model with random weights, and where to cut it in two."""
    torch.manual_seed(0)
    if name == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": LENGTH}
        sizes |= {"bos_token_id": 0, "eos_token_id": 0}
        no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **sizes, **no_dropout)), ["transformer.h.2"]
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **sizes)), ["model.layers.2"]


def loss_fn(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def main(name: str = "gpt2", steps: int = 5) -> list[tuple[float, float]]:
    """Returns each step's loss, of the pipeline and of the unsplit model."""
    mesh = dist.group.WORLD if dist.is_initialized() else None
    model, cuts = make(name)
    unsplit = copy.deepcopy(model)
    losses = []
    with pe.Pipeline(cut(model, cuts), microbatches=MICROBATCHES, loss_fn=loss_fn, mesh=mesh) as pipe:
        ours = torch.optim.AdamW(pipe.parameters(), lr=1e-2)
        theirs = torch.optim.AdamW(unsplit.parameters(), lr=1e-2)
        ids = torch.randint(WORDS, (ROWS, LENGTH))
        mask = torch.ones_like(ids)
        mask[::2, :3] = 0  # every other row is shorter
        for step in range(steps):
            loss = pipe.step(input_ids=ids, attention_mask=mask, target=ids)
            expected = loss_fn(unsplit(input_ids=ids, attention_mask=mask).logits, ids)
            expected.backward()
            for optimizer in (ours, theirs):
                optimizer.step()
                optimizer.zero_grad()
            losses.append((loss.item(), expected.item()))
            if mesh is None or mesh.rank() == 0:
                print(f"step {step}: loss {loss:.6f}, unsplit {expected:.6f}")
    return losses


if __name__ == "__main__":
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    main(*sys.argv[1:])
    if dist.is_initialized():
        dist.destroy_process_group()
