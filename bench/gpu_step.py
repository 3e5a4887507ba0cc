"""A training step of a GPT whose stages share one GPU: this engine, its peer, and plain accumulation.

At three sizes: bound by launches, by compute, and between. Parameters are bfloat16: autocast's casts would be
part of every contender's time and none's difference. The contenders take turns in one process, each timed by
events on the current stream; a ratio is of one round. Writes bench/results/DEVICE/gpu_step.json.
"""

import gc
import time

import torch
from environment import write_results
from gpu_contenders import CAPTURED, GRAPHS, OVERLAP, PEER, PLAIN, SINGLE, Size, contenders, wants_smoke
from side_by_side import spread, wait_until_quiet
from tables import gpu_step as table
from turns import one_step, rounds_until, take_turns

SIZES = {  # and seconds for each number of stages; compute-bound, all contenders together hold about 90 GiB
    Size("launch-bound", width=512, layers=8, rows=1, context=256): 8,
    Size("middle", width=1536, layers=8, rows=2, context=1024): 12,
    Size("compute-bound", width=4096, layers=4, rows=4, context=2048): 48,
}
SMOKE = {Size("smoke", width=16, layers=4, rows=1, context=8): 0}
ROUNDS = 3, 21  # at least, at most
RATIOS = [  # of speeds, and what is aimed for by size
    (GRAPHS, PEER, {"launch-bound": 3.0}),
    (GRAPHS, CAPTURED, {"launch-bound": 0.95, "middle": 0.95, "compute-bound": 0.95}),
    (GRAPHS, PLAIN, {"compute-bound": 0.99}),
    (OVERLAP, PEER, {}),
    (OVERLAP, SINGLE, {"middle": 1.05}),
    (OVERLAP, PLAIN, {"compute-bound": 0.99}),
]


def measure(size: Size, stages: int, device: str, seconds: float, rounds: tuple[int, int]) -> dict:
    """One row: the step time and the peak memory of each contender, and the ratios."""
    deadline = time.monotonic() + seconds
    trainers, peaks, left_out = {}, {}, {}
    for name, make in contenders(size, stages, device).items():
        before = _peak_from_here(device)
        trainer = make()
        trainer.warm_up()
        peaks[name] = (_peak(device) - before) / 2**30
        if name == GRAPHS and trainer.pipe.graph.fallback:
            left_out[name] = trainer.pipe.graph.fallback
        else:
            trainers[name] = trainer

    def turn(name: str) -> float:
        trainers[name].zero_grad()
        return one_step(trainers[name].step, device)

    times = take_turns(rounds_until(deadline, *rounds), {name: lambda n=name: turn(n) for name in trainers})
    for trainer in trainers.values():
        if trainer.pipe is not None:
            trainer.pipe.close()
    return {
        "size": size.name,
        "stages": stages,
        "width": size.width,
        "layers": size.layers,
        "microbatch": [size.rows, size.context],
        "microbatches": size.microbatches,
        "rounds": len(times[PLAIN]),
        "left_out": left_out,
        "step_ms": {name: spread([t * 1e3 for t in taken]) for name, taken in times.items()},
        "peak_gib": peaks,
        "ratios": [
            {
                "ours": ours,
                "other": other,
                "faster_by": spread([b / a for a, b in zip(times[ours], times[other])]),
                "aim": aims.get(size.name),
            }
            for ours, other, aims in RATIOS
            if ours in times and other in times
        ],
    }


def _peak_from_here(device: str) -> int:
    """Bytes allocated; the peak is counted from now on."""
    if device == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: str) -> int:
    """Peak of the bytes allocated, memory that a graph keeps to itself included."""
    if device == "cpu":
        return 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def show(row: dict) -> None:
    """Each contender's time and memory, then measured ratios beside their aims."""
    print(f"{row['size']}, {row['stages']} stages, {row['rounds']} rounds")
    for name, times in row["step_ms"].items():
        figures = "{min:9.2f} {median:9.2f} {max:9.2f} ms".format(**times)
        print(f"  {name:30} {figures}  {row['peak_gib'][name]:6.2f} GiB")
    for name, why in row["left_out"].items():
        print(f"  {name} is left out: {why}")
    for ratio in row["ratios"]:
        by, aim = ratio["faster_by"], ratio["aim"]
        aimed = "" if aim is None else f"  aim {aim}: {'met' if by['median'] >= aim else 'missed'}"
        figures = "{min:6.2f} {median:6.2f} {max:6.2f}".format(**by)
        print(f"  {ratio['ours']} over {ratio['other']:30} {figures}{aimed}", flush=True)


def main() -> None:
    smoke = wants_smoke(__doc__)
    torch.set_num_threads(1)
    device, sizes, rounds = ("cpu", SMOKE, (1, 1)) if smoke else ("cuda:0", SIZES, ROUNDS)
    quiet = smoke or wait_until_quiet(20)
    rows = []
    for size, seconds in sizes.items():
        for stages in (2, 4):
            rows.append(measure(size, stages, device, seconds, rounds))
            show(rows[-1])
            gc.collect()
            if device != "cpu":
                torch.cuda.empty_cache()
    if smoke:
        print("\n".join(table({"rows": rows})))
    else:
        write_results("gpu_step", "cuda", quiet=quiet, rows=rows)


if __name__ == "__main__":
    main()
