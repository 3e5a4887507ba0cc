"""Ranks of torch.distributed.pipelining's schedule runtime: processes joined by gloo that run orders."""

import multiprocessing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WIDTH = 8
SOON = 60.0  # far below what a hang would take


def stage_of(index: int) -> nn.Module:
    """A small stage, the same in every process."""
    generator = torch.Generator().manual_seed(index)
    stage = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())
    for parameter in stage.parameters():
        nn.init.normal_(parameter, generator=generator)
    return stage


def batch_of(microbatches: int) -> tuple[Tensor, Tensor]:
    """Input and target, two rows a microbatch."""
    generator = torch.Generator().manual_seed(99)
    x, y = torch.randn(2, 2 * microbatches, WIDTH, generator=generator)
    return x, y


def _serve(connection: Any, rank: int, ranks: int, store: str) -> None:
    """Runs one rank of each step that comes and sends its gradients, or what went wrong."""
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    while (job := connection.recv()) is not None:
        path, rank_of_stage, microbatches = job
        try:
            count = len(rank_of_stage)
            modules = {s: stage_of(s) for s in range(count) if rank_of_stage[s] == rank}
            stages = [PipelineStage(m, s, count, torch.device("cpu")) for s, m in modules.items()]
            for stage in stages:  # before the order is read it is taken to be looped
                stage.stage_index_to_group_rank = dict(enumerate(rank_of_stage))
            schedule = _PipelineScheduleRuntime(stages, microbatches, loss_fn=nn.functional.mse_loss)
            schedule._load_csv(path)
            x, y = batch_of(microbatches)
            schedule.step(*([x] if 0 in modules else []), target=y if count - 1 in modules else None)
            connection.send({s: [p.grad for p in m.parameters()] for s, m in modules.items()})
        except Exception as error:
            connection.send(repr(error))
    dist.destroy_process_group()


class Runtime:
    """``ranks`` processes, alive until the end of the with block."""

    def __init__(self, ranks: int, folder: Path) -> None:
        self._folder = folder
        context = multiprocessing.get_context("spawn")
        self._processes = []
        self._connections = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            args = (theirs, rank, ranks, str(folder / "store"))
            self._processes.append(context.Process(target=_serve, args=args, daemon=True))
            self._connections.append(ours)
            self._processes[-1].start()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *_: object) -> None:
        for connection, process in zip(self._connections, self._processes):
            connection.send(None)
            process.join(SOON)

    def gradients(self, csv: str, rank_of_stage: list[int], microbatches: int) -> list[list[Tensor]]:
        """By stage, those of one step in the order of ``csv``."""
        path = self._folder / "order.csv"
        path.write_text(csv)
        for connection in self._connections:
            connection.send((str(path), rank_of_stage, microbatches))
        found: dict[int, list[Tensor]] = {}
        for connection in self._connections:
            assert connection.poll(SOON), "the runtime stands still"
            answer = connection.recv()
            assert isinstance(answer, dict), answer
            found |= answer
        return [found[s] for s in sorted(found)]
