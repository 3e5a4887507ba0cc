"""Bytes a second of packing tensors into one buffer, beside other ways to do it and a plain copy.

Contenders take turns in one process; a ratio is of one round. On the CPU with one thread. On a GPU, with
--device cuda, calls are timed as they are, and captured in CUDA graphs. Writes bench/results/pack.json,
or for a GPU bench/results/DEVICE/pack.json.
"""

import argparse

import torch
from environment import write_results
from pack_contenders import CEILING, OURS, PEERS, contenders, left_out
from side_by_side import A_MOMENT, spread, wait_until_quiet
from turns import captured, on_cpu, on_gpu

KIB, MIB = 1 << 10, 1 << 20
CASES = {  # tensors, bytes of each
    "cpu": [
        (64, 256),
        (64, 4 * KIB),
        (64, 16 * KIB),
        (8, 256 * KIB),
        (8, MIB),
        (64, 256 * KIB),
        (16, 4 * MIB),
    ],
    "cuda": [
        (64, 4 * KIB),
        (64, 16 * KIB),
        (64, 64 * KIB),
        (8, MIB),
        (64, MIB),
        (4, 16 * MIB),
        (64, 4 * MIB),
    ],
}
TYPES = [  # of the tensors, and as they travel
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float8_e4m3fn),
    (torch.uint8, torch.uint8),  # what travels as it is
]


def measure(
    count: int, nbytes: int, dtype: torch.dtype, wire: torch.dtype, device: str, rounds: int
) -> list[dict]:
    """A row for each contender: its bytes a second, and ours in proportion, round by round."""
    tensors = [torch.randn(nbytes // dtype.itemsize, device=device).to(dtype) for _ in range(count)]
    calls = contenders(tensors, wire)
    if device == "cpu":
        found = {"called": on_cpu(calls, rounds)}
    else:
        found = {"called": on_gpu(calls, rounds), "captured": on_gpu(captured(calls), rounds)}
    return [
        {
            "tensors": count,
            "bytes": nbytes,
            "dtype": str(dtype).removeprefix("torch."),
            "wire": str(wire).removeprefix("torch."),
            "mode": mode,
            "contender": name,
            "gigabytes_per_second": spread([count * nbytes / t / 1e9 for t in taken]),
            "ours_is_faster_by": spread([t / ours for t, ours in zip(taken, times[OURS])]),
        }
        for mode, times in found.items()
        for name, taken in times.items()
    ]


def show(rows: list[dict]) -> None:
    """Prints ours beside the best of the others and the plain copy, of rows of one case and mode."""
    by_name = {row["contender"]: row for row in rows}
    peers = [by_name[name] for name in PEERS if name in by_name]
    best = min(peers, key=lambda row: row["ours_is_faster_by"]["median"])
    ours = by_name[OURS]
    print(
        f"{ours['tensors']:4} x {ours['bytes']:10,}  {ours['dtype']:8} {ours['wire']:13} {ours['mode']:8} "
        f"{ours['gigabytes_per_second']['median']:8.1f} "
        f"{by_name[CEILING]['ours_is_faster_by']['median']:8.2f}  "
        + "{min:6.2f} {median:6.2f} {max:6.2f}".format(**best["ours_is_faster_by"])
        + f"  {best['contender']}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=list(CASES), default="cpu")
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device")
    torch.set_num_threads(1)
    rows: list[dict] = []
    on_a_gpu = options.device == "cuda"
    about: dict[str, object] = {"quiet": wait_until_quiet(*[A_MOMENT] * on_a_gpu)}
    if on_a_gpu:
        about["left_out"] = left_out()
        for name, why in left_out().items():
            print(f"{name} is left out: {why}")
    print(
        f"{'tensors':>17}  {'from':8} {'to':13} {'':8} {'our GB/s':>8} {'of copy':>8}  "
        f"{'faster than the best other by':>20}"
    )
    for dtype, wire in TYPES:
        for count, nbytes in CASES[options.device]:
            found = measure(count, nbytes, dtype, wire, options.device, options.rounds)
            for mode in dict.fromkeys(row["mode"] for row in found):
                show([row for row in found if row["mode"] == mode])
            rows += found
        if on_a_gpu or (dtype, wire) == TYPES[-1]:
            write_results("pack", options.device, **about, ours=OURS, peers=PEERS, ceiling=CEILING, rows=rows)


if __name__ == "__main__":
    main()
