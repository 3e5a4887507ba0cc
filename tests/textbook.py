"""Published orders, written down independently of the schedules under test."""


def gpipe(stage: int, stages: int, microbatches: int) -> list[str]:
    return [f"{stage}{kind}{m}" for kind in "FB" for m in range(microbatches)]


def one_f_one_b(stage: int, stages: int, microbatches: int) -> list[str]:
    """Warm up with one forward for each stage below, then alternate, then drain."""
    warmup = min(stages - stage - 1, microbatches)
    order = [f"{stage}F{m}" for m in range(warmup)]
    for m in range(microbatches - warmup):
        order += [f"{stage}F{warmup + m}", f"{stage}B{m}"]
    return order + [f"{stage}B{m}" for m in range(microbatches - warmup, microbatches)]


def interleaved(rank: int, ranks: int, chunks: int, microbatches: int) -> list[str]:
    """Megatron-LM's order, by the index arithmetic of its published description."""
    total = microbatches * chunks
    warmup = min(total, (ranks - rank - 1) * 2 + (chunks - 1) * ranks)

    def action(k: int, kind: str) -> str:
        in_group = k % (ranks * chunks)
        chunk = in_group // ranks
        if kind == "B":
            chunk = chunks - 1 - chunk
        m = k // (ranks * chunks) * ranks + in_group % ranks
        return f"{chunk * ranks + rank}{kind}{m}"

    order = [action(k, "F") for k in range(warmup)]
    for k in range(total - warmup):
        order += [action(warmup + k, "F"), action(k, "B")]
    return order + [action(k, "B") for k in range(total - warmup, total)]
