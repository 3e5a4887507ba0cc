"""Models of transformers, made tiny, and a batch for each."""

import torch
import transformers
from torch import Tensor, nn

NAMES = ("llama", "llama-tied", "gpt2", "t5", "mixtral", "vit")
DECODER = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
}


def config(name: str) -> transformers.PretrainedConfig:
    return {
        "llama": lambda: transformers.LlamaConfig(**DECODER),
        "llama-tied": lambda: transformers.LlamaConfig(**DECODER, tie_word_embeddings=True),
        "gpt2": lambda: transformers.GPT2Config(
            vocab_size=64, n_embd=16, n_layer=4, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2
        ),
        "t5": lambda: transformers.T5Config(
            vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
        ),
        "mixtral": lambda: transformers.MixtralConfig(
            **DECODER, num_local_experts=2, output_router_logits=True
        ),
        "vit": lambda: transformers.ViTConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            image_size=8,
            patch_size=4,
            num_labels=5,
        ),
    }[name]()


def auto_class(name: str) -> type:
    kinds = {"t5": transformers.AutoModelForSeq2SeqLM, "vit": transformers.AutoModelForImageClassification}
    return kinds.get(name, transformers.AutoModelForCausalLM)


def made(name: str, device: str = "meta", seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    with torch.device(device):
        return auto_class(name).from_config(config(name)).eval()


def batch(name: str) -> dict[str, Tensor]:
    """Of four rows; text has padding."""
    generator = torch.Generator().manual_seed(1)
    if name == "vit":
        return {
            "pixel_values": torch.randn(4, 3, 8, 8, generator=generator),
            "labels": torch.arange(4),
        }
    ids = torch.randint(3, 64, (4, 8), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
