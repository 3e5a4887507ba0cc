"""A training step of a GPT whose stages share one GPU: this engine, its peer, and plain accumulation.

At three sizes: bound by launches, by compute, and between. Parameters are bfloat16: autocast's casts would be
part of every contender's time and none's difference. The contenders take turns in one process. Each is made for
its turn and dropped after it, so that only one holds memory, and timed by events on the current stream; a ratio
is of one round. Writes bench/results/DEVICE/gpu_step.json, row by row.
"""

import gc
import math
import statistics
import time

import torch
from environment import write_results
from gpu_contenders import (
    CAPTURED,
    GRAPHS,
    OVERLAP,
    PEER,
    PLAIN,
    SINGLE,
    Size,
    contenders,
    device_here,
    wants_smoke,
)
from side_by_side import A_MOMENT, spread, wait_until_quiet
from tables import gpu_step as table
from turns import one_step, rounds_until, take_turns

SIZES = {  # and seconds for each number of stages
    Size("launch-bound", width=512, layers=8, rows=1, context=256): 20,
    Size("middle", width=1536, layers=8, rows=2, context=1024): 30,
    Size("compute-bound", width=4096, layers=4, rows=4, context=2048): 90,
}
SMOKE = {Size("smoke", width=16, layers=4, rows=1, context=8): 0}
ROUNDS = 3, 21  # at least, at most
STEPS = 5  # of a turn
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
    makers, peaks, reserved, left_out = contenders(size, stages, device), {}, {}, {}

    def turn(name: str) -> float:
        if name in left_out:
            return math.nan
        try:
            _begin_memory(device)
            trainer = makers[name]()
            trainer.warm_up()
            peaks[name], reserved[name] = (nbytes / 2**30 for nbytes in _peak_memory(device))
            if name == GRAPHS and trainer.pipe.graph.fallback:
                left_out[name] = trainer.pipe.graph.fallback
            taken = []
            for _ in range(STEPS):
                trainer.zero_grad()
                taken.append(one_step(trainer.step, device))
            if trainer.pipe is not None:
                trainer.pipe.close()
            return statistics.median(taken)
        except Exception as error:
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            return math.nan

    times = take_turns(rounds_until(deadline, *rounds), {name: lambda n=name: turn(n) for name in makers})
    times = {name: taken for name, taken in times.items() if name not in left_out}
    return {
        "size": size.name,
        "stages": stages,
        "width": size.width,
        "layers": size.layers,
        "microbatch": [size.rows, size.context],
        "microbatches": size.microbatches,
        "rounds": max(map(len, times.values()), default=0),
        "left_out": left_out,
        "step_ms": {name: spread([t * 1e3 for t in taken]) for name, taken in times.items()},
        "peak_gib": peaks,
        "reserved_gib": reserved,
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


def _begin_memory(device: str) -> None:
    """Frees what the contender before has left; peaks are counted from now on."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak_memory(device: str) -> tuple[int, int]:
    """Peaks of the bytes allocated and of those that torch took from the GPU, which a graph keeps to itself."""
    if device == "cpu":
        return 0, 0
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()


def show(row: dict) -> None:
    """Each contender's time and memory, then measured ratios beside their aims."""
    print(f"{row['size']}, {row['stages']} stages, {row['rounds']} rounds")
    for name, times in row["step_ms"].items():
        figures = "{min:9.2f} {median:9.2f} {max:9.2f} ms".format(**times)
        peak, reserved = row["peak_gib"][name], row["reserved_gib"][name]
        print(f"  {name:30} {figures}  {peak:6.2f} GiB, reserved {reserved:6.2f} GiB")
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
    device, sizes, rounds = (device_here(), SMOKE, (1, 1)) if smoke else ("cuda:0", SIZES, ROUNDS)
    quiet = smoke or wait_until_quiet(A_MOMENT)
    rows = []
    for size, seconds in sizes.items():
        for stages in (2, 4):
            rows.append(measure(size, stages, device, seconds, rounds))
            show(rows[-1])
            if not smoke:
                write_results("gpu_step", "cuda", quiet=quiet, rows=rows)
    if smoke:
        print("\n".join(table({"rows": rows})))
    if any(row["left_out"] for row in rows):
        raise SystemExit("not all contenders could be measured")


if __name__ == "__main__":
    main()
