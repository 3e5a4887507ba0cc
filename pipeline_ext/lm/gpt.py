"""A small GPT over bytes: an embedding, blocks, a head. It is an nn.Sequential, so it can be cut anywhere."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # every byte is a token


class Embedding(nn.Module):
    """Bytes [batch, time] to vectors [batch, time, width], with learned positions."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(context, width)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.byte(tokens) + self.position.weight[: tokens.shape[1]]


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        qkv = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each after a layer norm and with a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Head(nn.Module):
    """Vectors [batch, time, width] to logits over bytes [batch, time, 256]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits(self.norm(x))


def gpt(*, context: int, width: int, layers: int, heads: int) -> nn.Sequential:
    """The model with GPT-2's initialization: normal; at the end of residual branches scaled by depth."""
    model = nn.Sequential(
        Embedding(context, width),
        *(Block(width, heads) for _ in range(layers)),
        Head(width),
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            ends_a_branch = name.endswith(("attention.out.weight", "mlp.2.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if ends_a_branch else 0.02)
    return model


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross entropy in nats per byte, computed in float32."""
    return F.cross_entropy(logits.flatten(0, 1).float(), target.flatten())


def count_parameters(model: nn.Module) -> int:
    """Number of the model's trainable scalars."""
    return sum(p.numel() for p in model.parameters())


def bits(nats: float) -> float:
    """Nats to bits."""
    return nats / float(torch.log(torch.tensor(2.0)))
