"""A GPT's training step on one device, by each contender: gradients over 16 microbatches, no optimizer."""

import argparse
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, ScheduleInterleaved1F1B
from turns import Call

import pipeline_ext as pe
from pipeline_ext.lm.gpt import VOCABULARY, gpt, loss_fn
from pipeline_ext.model import cut as partition

PLAIN = "plain accumulation"
CAPTURED = "plain accumulation, captured"
PEER = "torch.distributed.pipelining"
SINGLE = "pipeline_ext, one stream"
OVERLAP = "pipeline_ext, overlap"
GRAPHS = "pipeline_ext, graphs"
WARM_UP = 3  # steps: graph mode captures the third


@dataclass(frozen=True)
class Size:
    """A GPT with parameters in bfloat16, and what a microbatch of it is."""

    name: str
    width: int
    layers: int
    rows: int
    context: int
    microbatches: int = 16

    def model(self, device: str) -> nn.Sequential:
        torch.manual_seed(0)
        heads = max(1, self.width // 128)
        with torch.device(device):
            model = gpt(context=self.context, width=self.width, layers=self.layers, heads=heads)
        return model.to(torch.bfloat16)

    def batch(self, device: str) -> tuple[Tensor, Tensor]:
        """Bytes and those that follow, int64 [rows of all microbatches, context]."""
        shape = (self.microbatches * self.rows, self.context + 1)
        tokens = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(1)).to(device)
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def wants_smoke(description: str) -> bool:
    """Reads a benchmark's arguments: whether it is to run small. Ends it where it needs a GPU."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--smoke", action="store_true", help="one tiny round, on the CPU if need be; writes nothing"
    )
    smoke = parser.parse_args().smoke
    if not smoke and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    return smoke


def device_here() -> str:
    """The first GPU, or the CPU."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


class Trainer(NamedTuple):
    """What one contender does: a step, and what a user does before each."""

    step: Call
    zero_grad: Call
    pipe: pe.Pipeline | None = None
    kept: object = None  # what the step uses without referring to it

    def warm_up(self) -> None:
        for _ in range(WARM_UP):
            self.zero_grad()
            self.step()


def contenders(size: Size, stages: int, device: str) -> dict[str, Callable[[], Trainer]]:
    """Name -> what makes it, each with a model of its own. The CPU has no graphs."""
    eager = {
        PLAIN: lambda: _plain(size, device),
        PEER: lambda: _theirs(size, stages, device),
        SINGLE: lambda: ours(size, stages, device, ranks=1, overlap=False),
        OVERLAP: lambda: ours(size, stages, device, ranks=stages, overlap=True),
    }
    if device == "cpu":
        return eager
    return {
        **eager,
        CAPTURED: lambda: _captured(size, device),
        GRAPHS: lambda: ours(size, stages, device, ranks=stages, overlap=True, graphs=True),
    }


def ours(size: Size, stages: int, device: str, ranks: int, **settings: Any) -> Trainer:
    """This engine; all ranks on one device."""
    model, (x, y) = size.model(device), size.batch(device)
    pipe = pe.Pipeline(
        model,
        num_stages=stages,
        microbatches=size.microbatches,
        schedule="1f1b" if ranks == stages else "interleaved-1f1b",
        loss_fn=loss_fn,
        devices=[device] * ranks,
        trace=False,
        **settings,
    )
    return Trainer(functools.partial(pipe.step, x, target=y), model.zero_grad, pipe)


def _plain(size: Size, device: str) -> Trainer:
    model, (x, y) = size.model(device), size.batch(device)
    parts = list(zip(x.tensor_split(size.microbatches), y.tensor_split(size.microbatches)))

    def step() -> None:
        for a, b in parts:
            (loss_fn(model(a), b) * (1 / size.microbatches)).backward()

    return Trainer(step, model.zero_grad)


def _captured(size: Size, device: str) -> Trainer:
    """Its gradients lie in the graph's memory and are written anew by each replay."""
    plain = _plain(size, device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        plain.warm_up()
    torch.cuda.synchronize()
    plain.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        plain.step()
    return Trainer(graph.replay, lambda: None, kept=plain)


def _theirs(size: Size, stages: int, device: str) -> Trainer:
    """All stages on one rank, in a group of one process that never sends."""
    if not dist.is_initialized():
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    model, (x, y) = size.model(device), size.batch(device)
    parts = [
        PipelineStage(module, i, stages, torch.device(device))
        for i, module in enumerate(partition.cut(model, stages))
    ]
    schedule = ScheduleInterleaved1F1B(parts, size.microbatches, loss_fn=loss_fn)
    step = functools.partial(schedule.step, x, target=y, losses=[], return_outputs=False)
    return Trainer(step, model.zero_grad)
