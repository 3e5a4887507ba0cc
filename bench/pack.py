"""Bytes a second of packing tensors into one buffer, beside torch's ways to do it and a plain memory copy.

Contenders take turns in one process of one thread; a ratio is of one round. Writes bench/results/pack.json.
"""

import argparse
import ctypes
import functools
import time
from collections.abc import Callable

import torch
from environment import write_results
from side_by_side import spread, wait_until_quiet
from torch import Tensor

from pipeline_ext.packing import Layout, packer

CASES = [  # tensors, bytes of each
    (64, 256),
    (64, 4 << 10),
    (64, 16 << 10),
    (8, 256 << 10),
    (64, 256 << 10),
    (4, 4 << 20),
    (16, 4 << 20),
]
TYPES = [  # of the tensors, and as they travel
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float8_e4m3fn),
]
OURS = "pipeline_ext"
CEILING = "memcpy of what travels"
TURN = 0.004  # seconds, about


def contenders(tensors: list[Tensor], wire: torch.dtype) -> dict[str, Callable[[], object]]:
    """Name -> what packs the tensors once, each into a buffer of its own."""
    count, length = len(tensors), tensors[0].numel()
    layout = Layout.of(tensors, wire)
    pack = packer(layout, tensors).pack
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    joined, parts, singly = (torch.zeros(count * length, dtype=wire) for _ in range(3))
    views, single_views = list(parts.split(length)), list(singly.split(length))
    whole = torch.cat(tensors).to(wire)
    copied = torch.zeros_like(whole)

    def one_by_one() -> None:
        for view, tensor in zip(single_views, tensors):
            view.copy_(tensor)

    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def copy_what_travels() -> None:
        memcpy(copied.data_ptr(), whole.data_ptr(), whole.nbytes)

    return {
        OURS: functools.partial(pack, buffer),
        "torch.cat": functools.partial(torch.cat, tensors, out=joined),
        "torch._foreach_copy_": functools.partial(torch._foreach_copy_, views, tensors),
        "Tensor.copy_, one by one": one_by_one,
        CEILING: copy_what_travels,
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - begin) / repeats


def measure(count: int, nbytes: int, dtype: torch.dtype, wire: torch.dtype, rounds: int) -> list[dict]:
    """A row for each contender: its bytes a second, and ours in proportion, round by round."""
    tensors = [torch.randn(nbytes // dtype.itemsize).to(dtype) for _ in range(count)]
    calls = contenders(tensors, wire)
    repeats = {name: max(1, int(TURN / seconds(call, 3))) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(seconds(call, repeats[name]))
    return [
        {
            "tensors": count,
            "bytes": nbytes,
            "dtype": str(dtype).removeprefix("torch."),
            "wire": str(wire).removeprefix("torch."),
            "contender": name,
            "gigabytes_per_second": spread([count * nbytes / t / 1e9 for t in taken]),
            "ours_is_faster_by": spread([t / ours for t, ours in zip(taken, times[OURS])]),
        }
        for name, taken in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict] = []
    quiet = wait_until_quiet()
    print(f"{'tensors':>16}  {'from':8} {'to':13}  {'best of torch':24} {'our GB/s':>9}  ours is faster by")
    for dtype, wire in TYPES:
        for count, nbytes in CASES:
            found = measure(count, nbytes, dtype, wire, options.rounds)
            rows += found
            peers = [row for row in found if row["contender"] not in (OURS, CEILING)]
            best = min(peers, key=lambda row: row["ours_is_faster_by"]["median"])
            print(
                f"{count:4} x {nbytes:9,}  {found[0]['dtype']:8} {found[0]['wire']:13}  "
                f"{best['contender']:24} {found[0]['gigabytes_per_second']['median']:9.1f}  "
                "{min:.2f} {median:.2f} {max:.2f}".format(**best["ours_is_faster_by"])
            )
    write_results("pack", quiet=quiet, rows=rows)


if __name__ == "__main__":
    main()
