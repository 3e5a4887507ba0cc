"""The memory of processes that share a model which none of them could hold.

A Llama of 1 GB in float32 lies in safetensors files. Each of 4 processes makes it on the meta device, cuts it,
and loads its own stage. Its peak resident size, without that of a process that has only imported the packages,
stands beside the bytes of its stage. So does the peak after the model was saved again. Writes
bench/results/big_model.json.
"""

import argparse
import gc
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from environment import write_results

import pipeline_ext as pe

PROCESSES = 4
AIM = 1.3  # peak, by the stage's bytes
SHARD = 32 << 20  # bytes of a file that is saved

_spawn = multiprocessing.get_context("spawn")


def imported() -> Any:
    """Imports what the processes use; returns transformers."""
    import torch.distributed  # noqa: F401
    import transformers

    transformers.logging.set_verbosity_error()
    assert transformers.AutoModelForCausalLM and transformers.LlamaForCausalLM
    assert pe.Pipeline and pe.load_pretrained and pe.save_pretrained
    import safetensors.torch  # noqa: F401

    return transformers


def config(smoke: bool) -> Any:
    width, layers, words = (64, 6, 512) if smoke else (1024, 18, 16000)
    return imported().LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        vocab_size=words,
        max_position_embeddings=128,
    )


def resident(field: str) -> int:
    """Bytes of this process in memory, from Linux: VmRSS now, VmHWM at the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) * 1024


def nothing() -> int:
    """A process that has only imported the packages."""
    imported()
    gc.collect()
    return resident("VmHWM")


def write(folder: str, smoke: bool) -> int:
    """Writes the model; returns its bytes."""
    model = imported().AutoModelForCausalLM.from_config(config(smoke))
    pe.save_pretrained(model, folder, max_shard_size=256 << 20)
    return sum(p.nbytes for p in model.parameters())


def stage(rank: int, folder: str, smoke: bool) -> dict[str, Any]:
    """A process with its stage."""
    import torch.distributed as dist

    transformers = imported()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config(smoke))
    ids = torch.zeros(8, 64, dtype=torch.long)
    batch = {"input_ids": ids, "labels": ids}
    begin = time.perf_counter()
    pipe = pe.Pipeline(model, PROCESSES, 4, sample=batch, mesh=dist.group.WORLD)
    made = time.perf_counter()
    pe.load_pretrained(pipe, f"{folder}/model")
    loaded = time.perf_counter()
    found = {
        "share": sum(p.nbytes for p in pipe.parameters()),
        "peak": resident("VmHWM"),
        "made_s": made - begin,
        "loaded_s": loaded - made,
    }
    pe.save_pretrained(pipe, f"{folder}/again", max_shard_size=SHARD)
    found |= {"peak_saved": resident("VmHWM"), "saved_s": time.perf_counter() - loaded}
    pipe.close()
    dist.destroy_process_group()
    return found


def _answer(connection: Any, body: Callable[..., Any], args: tuple) -> None:
    connection.send(body(*args))


def in_processes(bodies: list[tuple[Callable[..., Any], tuple]]) -> list[Any]:
    """What the functions return, each in a process of its own."""
    running = []
    for body, args in bodies:
        here, there = _spawn.Pipe(duplex=False)
        process = _spawn.Process(target=_answer, args=(there, body, args), daemon=True)
        process.start()
        there.close()
        running.append((here, process))
    return [(here.recv(), process.join())[0] for here, process in running]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="a small model; writes nothing")
    smoke = parser.parse_args().smoke
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    with tempfile.TemporaryDirectory() as folder:
        (total,) = in_processes([(write, (f"{folder}/model", smoke))])
        (empty,) = in_processes([(nothing, ())])
        rows = in_processes([(stage, (rank, folder, smoke)) for rank in range(PROCESSES)])
    for row in rows:
        row["over_share"] = (row["peak"] - empty) / row["share"]
        row["saved_over_share"] = (row["peak_saved"] - empty) / row["share"]
        print(
            f"share {row['share'] / 1e6:.0f} MB, peak {(row['peak'] - empty) / 1e6:.0f} MB "
            f"({row['over_share']:.2f}), saved {row['saved_over_share']:.2f}; made in {row['made_s']:.1f} s, "
            f"loaded in {row['loaded_s']:.1f} s, saved in {row['saved_s']:.1f} s"
        )
    if not smoke:
        write_results("big_model", model_bytes=total, empty_process=empty, aim=AIM, shard=SHARD, rows=rows)


if __name__ == "__main__":
    main()
