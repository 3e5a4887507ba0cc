"""Orders, costs and limits drawn at random, for property tests of whatever takes a plan."""

import random
from itertools import pairwise

from hypothesis import strategies as st

import pipeline_ext as pe
from pipeline_ext import _C

Task = tuple[int, str, int]  # stage, kind, microbatch
NAMED = tuple(name for name in _C.schedule_names() if name != "dualpipe")


def needs(task: Task, stages: int, split: bool) -> list[Task]:
    """What a task waits for, written down independently of the core; ``split``: whether the next stage's
    backward is."""
    s, kind, m = task
    if kind == "F":
        return [(s - 1, "F", m)] if s else []
    if kind == "W":
        return [(s, "I", m)]
    return [(s, "F", m)] + ([(s + 1, "I" if split else "B", m)] if s + 1 < stages else [])


def parse(cell: str) -> list[Task]:
    """The tasks of a cell that computes, of which an overlapped pair holds two."""
    parts = cell.removesuffix("OVERLAP_F_B").strip("()").split(";")
    kinds = [next(c for c in part if c.isalpha()) for part in parts]
    numbers = [tuple(map(int, part.split(kind))) for part, kind in zip(parts, kinds)]
    return [(s, kind, m) for kind, (s, m) in zip(kinds, numbers)]


@st.composite
def orders(draw, ascending: bool = False, pairs: bool = True) -> list[list[str]]:
    """Rows of cells that end when run in order: a random placement, and of each moment's ready tasks a random
    one is next. With ``ascending`` the microbatches of each stage and kind keep their order."""
    stages = draw(st.integers(1, 6))
    microbatches = draw(st.integers(1, 6))
    placement = draw(st.lists(st.integers(0, 3), min_size=stages, max_size=stages))
    ranks = sorted(set(placement))
    split = draw(st.booleans())
    pairs = pairs and draw(st.booleans())
    chance = random.Random(draw(st.integers(0, 2**32)))

    kinds = "FIW" if split else "FB"
    left = {(s, kind, m) for s in range(stages) for kind in kinds for m in range(microbatches)}
    rows: list[list[str]] = [[] for _ in ranks]
    while left:
        ready = sorted(task for task in left if left.isdisjoint(needs(task, stages, split)))
        if ascending:
            ready = [t for t in ready if not any((t[0], t[1], m) in left for m in range(t[2]))]
        chosen = [chance.choice(ready)]
        rank = placement[chosen[0][0]]
        if pairs and chance.random() < 0.3:
            others = [t for t in ready if placement[t[0]] == rank and t != chosen[0]]
            chosen += chance.sample(others, min(1, len(others)))
        left -= set(chosen)
        texts = [f"{s}{kind}{m}" for s, kind, m in chosen]
        rows[ranks.index(rank)].append(f"({';'.join(texts)})OVERLAP_F_B" if len(texts) > 1 else texts[0])
    return rows


@st.composite
def costs_for(draw, plan, contention: bool = True) -> pe.Costs:
    """Costs of every kind but a limit of memory, by stage and boundary, some of them 0."""
    stages = plan.num_stages
    number = st.one_of(st.just(0.0), st.floats(0.01, 3.0))

    def some(count: int, values=number) -> list[float]:
        return draw(st.lists(values, min_size=count, max_size=count))

    def factors() -> object:
        microbatches, levels = plan.num_microbatches, draw(st.sampled_from((None, 0, 1, 2)))
        if levels is None:
            return None
        if levels == 0:
            return some(microbatches)
        rows = [some(microbatches) for _ in range(stages)]
        return rows if levels == 1 else [[some(4) for _ in row] for row in rows]

    taken = some(stages, st.floats(0.5, 3.0))
    share = draw(st.floats(0.0, 1.0))
    return pe.Costs(
        forward=some(stages),
        backward=some(stages),
        input_grad=some(stages),
        weight_grad=some(stages),
        latency=some(stages - 1),
        overhead=some(stages - 1),
        bandwidth=some(stages - 1, st.floats(0.5, 2.0)),
        message_bytes=some(stages - 1),
        contention=draw(st.floats(1.0, 2.0)) if contention else 1.0,
        pair=draw(st.floats(0.3, 1.5)),
        act_memory=taken,
        mem_i=[share * t for t in taken],
        microbatch=factors(),
    )


def is_sorted(values: list[float]) -> bool:
    """Whether no value is above the next."""
    return all(a <= b for a, b in pairwise(values))
