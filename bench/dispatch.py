"""Host time of an action beyond the eager compute it starts, with stages that do next to nothing.

Plain PyTorch, this engine and torch.distributed.pipelining take turns. Writes bench/results/dispatch.json.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
from environment import write_results
from side_by_side import Contender, Run, one_thread_a_process, running, spread, wait_until_quiet
from torch import Tensor, nn

WIDTH = 4
MICROBATCHES = 64
IN_TURN = (0, "F"), (1, "F"), (1, "B"), (0, "B")  # of each microbatch, where one rank runs all


def stages(device: str) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(WIDTH, WIDTH).to(device) for _ in range(2)]


def batch(device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    both = torch.randn(2, MICROBATCHES * WIDTH, WIDTH, generator=generator).to(device)
    return both[0], both[1]


def idle(device: str) -> Callable[[], None]:
    """What waits until the device has nothing to do."""
    return torch.cuda.synchronize if device != "cpu" else lambda: None


def timed(step, zero_grad, begin: Callable[[], object]) -> Run:
    """The host's microseconds of each step, after ``begin``; the first of a burst is not counted."""

    def run(steps: int) -> list[float]:
        times = []
        for _ in range(steps + 1):
            zero_grad()
            begin()
            start = time.perf_counter()
            step()
            times.append((time.perf_counter() - start) * 1e6)
        return times[1:]

    return run


def eager(device: str, rank: int) -> Run:
    """The forward and backward calls alone, of both stages."""
    torch.set_num_threads(1)
    (first, second), (x, y) = stages(device), batch(device)
    xs, ys = x.tensor_split(MICROBATCHES), y.tensor_split(MICROBATCHES)
    handed_on = [part.detach().clone().requires_grad_() for part in xs]
    gradient = torch.ones_like(xs[0])

    def step() -> None:
        for part, middle, target in zip(xs, handed_on, ys):
            out = first(part)
            loss = nn.functional.mse_loss(second(middle), target) * (1 / MICROBATCHES)
            loss.backward()
            middle.grad = None
            out.backward(gradient)

    def zero_grad() -> None:
        first.zero_grad()
        second.zero_grad()

    return timed(step, zero_grad, idle(device))


def accumulation(device: str, rank: int) -> Run:
    """The unsplit model, microbatch by microbatch."""
    torch.set_num_threads(1)
    model, (x, y) = nn.Sequential(*stages(device)), batch(device)
    parts = list(zip(x.tensor_split(MICROBATCHES), y.tensor_split(MICROBATCHES)))

    def step() -> None:
        for part, target in parts:
            (nn.functional.mse_loss(model(part), target) * (1 / MICROBATCHES)).backward()

    return timed(step, model.zero_grad, idle(device))


def ours(ranks: int, overlap: bool, device: str, rank: int) -> Run:
    import pipeline_ext as pe

    torch.set_num_threads(1)
    model = nn.Sequential(*stages(device))
    one_rank = [[f"{s}{kind}{m}" for m in range(MICROBATCHES) for s, kind in IN_TURN]]
    pipe = pe.Pipeline(
        model,
        num_stages=2,
        microbatches=MICROBATCHES,
        schedule="1f1b" if ranks == 2 else one_rank,
        loss_fn=nn.functional.mse_loss,
        devices=[device] * ranks,
        overlap=overlap,
        trace=False,
    )
    x, y = batch(device)
    return timed(lambda: pipe.step(x, target=y), model.zero_grad, idle(device))


def theirs(ranks: int, store: str, device: str, rank: int) -> Run:
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from torch.distributed.pipelining.schedules import B, F, _Action, _PipelineScheduleRuntime

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    modules, (x, y) = stages(device), batch(device)
    if ranks == 1:
        schedule = _PipelineScheduleRuntime(
            [PipelineStage(module, i, 2, torch.device(device)) for i, module in enumerate(modules)],
            MICROBATCHES,
            loss_fn=nn.functional.mse_loss,
        )
        kinds = {"F": F, "B": B}
        order = [_Action(s, kinds[kind], m) for m in range(MICROBATCHES) for s, kind in IN_TURN]
        schedule._prepare_schedule_with_comms({0: order})
        step = functools.partial(schedule.step, x, target=y, losses=[], return_outputs=False)
        return timed(step, lambda: [module.zero_grad() for module in modules], idle(device))
    module = modules[rank]
    schedule = Schedule1F1B(
        PipelineStage(module, rank, 2, torch.device(device)), MICROBATCHES, loss_fn=nn.functional.mse_loss
    )
    if rank == 0:
        step = functools.partial(schedule.step, x, return_outputs=False)
    else:
        step = functools.partial(schedule.step, target=y, losses=[], return_outputs=False)
    return timed(step, module.zero_grad, dist.barrier)


def native_rate(rank: int) -> Run:
    """Million tasks a second of the executor, for tasks that do nothing and are all ready in turn."""
    import pipeline_ext as pe
    from pipeline_ext import _C

    plan = pe.build_plan("gpipe", num_stages=1, microbatches=50_000)
    program = _C.Program(plan, {})
    executor = _C.HostExecutor(["native"])

    def run(steps: int) -> list[float]:
        rates = []
        for _ in range(steps):
            begin = time.perf_counter()
            executor.run(program, timeout=60.0, record=False)
            rates.append(len(plan) / (time.perf_counter() - begin) / 1e6)
        return rates

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each contender in each round")
    options = parser.parse_args()
    one_thread_a_process()
    with tempfile.TemporaryDirectory() as folder:
        plain, native = Contender("eager", eager, "cpu"), Contender("native", native_rate)
        contenders = [
            Contender("pipeline_ext, one rank, one stream", ours, 1, False, "cpu"),
            Contender("pipeline_ext, one rank, two streams", ours, 1, True, "cpu"),
            Contender("pipeline_ext, two ranks", ours, 2, False, "cpu"),
            Contender("torch, both stages on one rank", theirs, 1, f"{folder}/1", "cpu"),
            Contender("torch, two processes", theirs, 2, f"{folder}/2", "cpu", ranks=2),
        ]
        # What the busiest rank does: the share of the compute, and for each microbatch so many actions; sends
        # and receives are actions of torch's, and no actions of ours.
        shares = [(1, 4), (1, 4), (1 / 2, 2), (1, 4), (1 / 2, 4)]
        rates, computes = [], []
        steps, overheads = [[] for _ in contenders], [[] for _ in contenders]
        with running([plain, native, *contenders]):
            quiet = wait_until_quiet()
            for _ in range(options.rounds):
                rates.append(statistics.median(native.run(3)[0]))
                computes.append(statistics.median(plain.run(options.steps)[0]))
                for i, (compute, actions) in enumerate(shares):
                    times = [max(step) for step in zip(*contenders[i].run(options.steps))]
                    steps[i].append(statistics.median(times))
                    beyond = steps[i][-1] - compute * computes[-1]
                    overheads[i].append(beyond / (actions * MICROBATCHES))
    print(f"eager compute: {statistics.median(computes):.0f} us a step of {4 * MICROBATCHES} calls")
    rows = []
    for contender, step, overhead in zip(contenders, steps, overheads):
        row = {"contender": contender.name, "step_us": spread(step), "overhead_us": spread(overhead)}
        rows.append(row)
        print(
            "{:36} step {:6.0f} us, an action above the compute {min:6.1f} {median:6.1f} {max:6.1f} us".format(
                contender.name, row["step_us"]["median"], **row["overhead_us"]
            )
        )
    print("native tasks: {min:.2f} {median:.2f} {max:.2f} M/s".format(**spread(rates)))
    write_results(
        "dispatch",
        quiet=quiet,
        microbatches=MICROBATCHES,
        eager_step_us=spread(computes),
        million_native_tasks_per_second=spread(rates),
        rows=rows,
    )


if __name__ == "__main__":
    main()
