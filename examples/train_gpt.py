"""Trains a small GPT through a pipeline, all in this file.

    python examples/train_gpt.py                                    # two stages in this process
    torchrun --standalone --nproc-per-node 2 examples/train_gpt.py  # a stage in each of two processes
    python examples/train_gpt.py --resume --steps 600               # goes on from the checkpoint, in either
    python examples/train_gpt.py --sample                           # text, by the plain model

The text is Python's own standard library, one byte a token; nothing is downloaded. The 300 steps take about 90
seconds of processor time, which the two ranks share. On GPUs it has not yet run.
"""

import argparse
import math
import os
import sysconfig
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import pipeline_ext as pe


class Embedding(nn.Module):
    """Bytes [rows, time] to vectors [rows, time, width]."""

    def __init__(self, context: int, width: int) -> None:
        super().__init__()
        self.byte = nn.Embedding(256, width)
        self.position = nn.Embedding(context, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.byte(x) + self.position.weight[: x.shape[1]]


class Block(nn.Module):
    """Causal attention, then a perceptron; each adds to what comes in."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.after_attention = nn.Linear(width, width, bias=False)
        self.perceptron = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        by_head = self.query_key_value(self.before_attention(x)).unflatten(2, (3, self.heads, -1))
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.after_attention(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(x)


def gpt(context: int, width: int, heads: int, layers: int) -> nn.Sequential:
    """Layers in a row, which a pipeline can cut anywhere. A seed makes them the same in every process."""
    torch.manual_seed(0)
    blocks = [Block(width, heads) for _ in range(layers)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 256, bias=False))
    model = nn.Sequential(Embedding(context, width), *blocks, head)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            adds = name.endswith(("after_attention.weight", "perceptron.3.weight"))
            nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * layers) if adds else 0.02)
    return model


def loss_fn(logits: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def read(path: str | None) -> Tensor:
    """All bytes of a file, or of the modules of Python's standard library."""
    files = [Path(path)] if path else sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)


def batch_of(step: int, data: Tensor, rows: int, context: int) -> tuple[Tensor, Tensor]:
    """Random pieces of text, and the same pieces one byte on: a step's own, in every process and every run."""
    starts = torch.randint(len(data) - context, (rows, 1), generator=torch.Generator().manual_seed(step))
    pieces = data[starts + torch.arange(context + 1)].long()
    return pieces[:, :-1], pieces[:, 1:]


def train(model: nn.Sequential, data: Tensor, options: argparse.Namespace, mesh: DeviceMesh | None) -> None:
    pipe = pe.Pipeline(
        model,
        num_stages=options.stages,
        microbatches=options.microbatches,
        schedule=options.schedule,
        loss_fn=loss_fn,
        mesh=mesh,
    )
    optimizer = torch.optim.AdamW(pipe.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    shows = mesh is None or mesh.get_rank() == 0
    if shows:
        print(f"{pipe.plan}\npredicted bubble {pipe.simulate().bubble:.0%}")

    done = pe.load_checkpoint(options.out, pipe, optimizer)["step"] if options.resume else 0
    began = time.perf_counter()
    for step in range(done + 1, options.steps + 1):
        inputs, target = batch_of(step, data, options.batch, options.context)
        for group in optimizer.param_groups:
            group["lr"] = options.rate * min(1.0, step / 20)
        optimizer.zero_grad()
        loss = pipe.step(inputs, target=target)  # forward and backward of all microbatches
        pipe.clip_grad_norm_(1.0)
        optimizer.step()

        if shows and (step % 10 == 0 or step == options.steps):
            speed = (step - done) * target.numel() / (time.perf_counter() - began)
            bits = loss.item() / math.log(2)
            print(f"step {step:4}  {bits:.3f} bits per byte  {speed:,.0f} bytes/s", flush=True)
        if step % 100 == 0 or step == options.steps:
            pe.save_checkpoint(options.out, pipe, optimizer, step=step)
    pipe.close()


@torch.no_grad()
def sample(model: nn.Sequential, prompt: str, length: int, context: int) -> str:
    """Continues a text. A checkpoint loads into the plain model, however many stages wrote it."""
    text = torch.tensor([list(prompt.encode())])
    for _ in range(length):
        logits = model(text[:, -context:])[:, -1]
        text = torch.cat([text, torch.multinomial((logits / 0.7).softmax(1), 1)], dim=1)
    return bytes(text[0].tolist()).decode(errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    sizes = {"steps": 300, "batch": 32, "context": 64, "width": 128, "heads": 4, "layers": 6}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--schedule", default="1f1b", help=", ".join(pe.schedule_names()))
    parser.add_argument("--rate", type=float, default=2e-3, help="learning rate")
    parser.add_argument("--data", help="a file to learn; without it Python's standard library")
    parser.add_argument("--out", default="runs/gpt", help="the folder of the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--sample", action="store_true", help="write text instead of training")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a rank is a core
    model = gpt(options.context, options.width, options.heads, options.layers)

    if options.sample:
        pe.load_checkpoint(options.out, model)
        print(sample(model, "def ", 400, options.context))
    elif "WORLD_SIZE" in os.environ:  # started by torchrun: each process is a rank
        device = "cuda" if torch.cuda.is_available() else "cpu"
        mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),), mesh_dim_names=("pp",))
        train(model, read(options.data), options, mesh)
        dist.destroy_process_group()
    else:
        train(model, read(options.data), options, None)


if __name__ == "__main__":
    main()
