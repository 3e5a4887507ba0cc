"""Every text that users give, orders, costs, the command line's arguments; and the calls that take them."""

import argparse
import contextlib
import io
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pipeline_ext as pe
from pipeline_ext.cli import main
from pipeline_ext.cli import options as train_options
from pipeline_ext.cli.plan_options import _COSTS
from pipeline_ext.plan import zero_bubble
from pipeline_ext.plan.costs_file import LISTED_BY
from pipeline_ext.plan.search import search

from .children import Subject
from .values import EDGES, csv, csv_of, harmed, junk, one_of, real, rows, schedule_name, some, whole

zero_bubble.WORK = 2_000  # of a search that nothing else bounds


def subjects() -> list[Subject]:
    """A subject for each call that takes a text, or numbers."""
    return [
        Subject("the CSV file of a schedule", _plan_of_file, (pe.PipelineError,)),
        Subject("a long CSV file", _plan_of_long_file, (pe.PipelineError,)),
        Subject("the lists of a schedule", _plan_of_rows, (pe.PipelineError,)),
        Subject("the numbers of a plan", _plan_of_numbers, (pe.PipelineError,)),
        Subject("the JSON file of costs", _costs_of_file, (pe.PipelineError,)),
        Subject("a long JSON file", _costs_of_long_file, (pe.PipelineError,)),
        Subject("costs", _simulated, (pe.PipelineError,)),
        Subject("a search", _searched, (pe.PipelineError,)),
        Subject("the arguments of plan", _plan_command, ()),
        Subject("the arguments of train", _train_command, (pe.PipelineError, OSError)),  # as the command shows
    ]


def _options(r: random.Random) -> dict[str, Any]:
    """Arguments of build_plan."""
    rare = {
        "num_ranks": whole(r, 4),
        "overlap": one_of(r, (True, False, junk(r))),
        "reactive": one_of(r, (True, False, junk(r))),
        "packs": some(r, lambda r: whole(r, 3)),
        "packs_forward": one_of(r, ([], [2], junk(r))),
        "in_flight": one_of(r, (1, 2, None, some(r, whole), junk(r))),
        "room": one_of(r, ([], some(r, whole), junk(r))),
        "memory": one_of(r, (pe.Costs(memory_limit=2.0), junk(r))),
        "costs": one_of(r, (None, pe.Costs(), junk(r))),
    }
    given = {name: value for name, value in rare.items() if r.random() < 0.15}
    return {"num_stages": whole(r, 5), "microbatches": whole(r, 6), **given}


def _of_order(r: random.Random, order: list[list[str]]) -> dict[str, Any]:
    """The same with the numbers that an order has."""
    found = _options(r)
    if r.random() < 0.8:
        actions = [cell for row in order for cell in row]
        found["num_stages"] = max(1, len({cell[:1] for cell in actions}))
        found["microbatches"] = (
            max((int(cell[-1]) for cell in actions if cell[-1:].isascii() and cell[-1:].isdigit()), default=0)
            + 1
        )
    return found


@contextlib.contextmanager
def _file(text: str | bytes, name: str = "given"):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(text if isinstance(text, bytes) else text.encode(errors="surrogatepass"))
        yield path


def _plan_of_file(r: random.Random) -> None:
    order = rows(r)
    text = csv_of(r, order)
    with _file(text, "order.csv") as path:
        given = (
            path
            if r.random() < 0.9
            else one_of(r, ("\0.csv", "/dev/zero.csv", path.parent / "none.csv", Path("/dev/zero")))
        )
        pe.build_plan(given, **_of_order(r, order))


def _plan_of_long_file(r: random.Random) -> None:
    """Up to a megabyte: few or many ranks, long cells, waits in a circle."""
    size = 1 << r.randint(10, 20)
    ranks = one_of(r, (1, 2, 100, 30_000))
    shape = r.randrange(6)
    if shape == 0:
        text = "\n" * size
    elif shape == 1:
        text = (
            ",".join(f"0F{m}" for m in range(size // 10)) + "," + ",".join(f"0B{m}" for m in range(size // 10))
        )
    elif shape == 2:
        parts = ";".join(f"0F{m}" for m in range(size // 8))
        text = f"({parts})OVERLAP_F_B"
    elif shape == 3:  # neighbours wait for one another
        eager, slow = "{0}F0,{0}F1,{0}B0,{0}B1", "{0}F0,{0}B0,{0}F1,{0}B1"
        text = "\n".join((eager if s % 2 else slow).format(s) for s in range(min(ranks, size // 40)))
    elif shape == 4:  # many stages on one rank
        count = size // 14
        text = (
            ",".join(f"{s}F0" for s in range(count)) + "," + ",".join(f"{s}B0" for s in reversed(range(count)))
        )
    else:
        text = csv(r) * (1 + size // 1000)
    with _file(text, "order.csv") as path:
        how = {
            "num_stages": min(ranks, 99),
            "microbatches": 2,
            "reactive": r.random() < 0.5,
            "overlap": r.random() < 0.2,
        }
        if r.random() < 0.5:
            pe.build_plan(path, **how)
        else:
            _run(["plan", "--from-csv", str(path)])


def _plan_of_rows(r: random.Random) -> None:
    order: Any = rows(r)
    options = _of_order(r, order)
    if r.random() < 0.1:
        order = one_of(
            r, (junk(r), [junk(r)], [[junk(r)]], {"a": 1, 2: 3}, {0: ["0F0"], 2: []}, dict(enumerate(order)))
        )
    plan = pe.build_plan(order, **options)
    pe.simulate(plan, noise=one_of(r, (0.0, 0.3, real(r))))


def _plan_of_numbers(r: random.Random) -> None:
    pe.build_plan(schedule_name(r), **_options(r))


def _cost(r: random.Random) -> Any:
    return one_of(r, (1.0, 2, real(r), some(r, real), [1.0, 2.0], one_of(r, EDGES), 10**400, junk(r)))


def _costs_of_file(r: random.Random) -> None:
    given = {one_of(r, (*LISTED_BY, *LISTED_BY, "x")): _cost(r) for _ in range(r.randint(0, 4))}
    with contextlib.suppress(TypeError):
        text = harmed(r, json.dumps(given, default=str))
        with _file(text) as path:
            costs = pe.Costs.load(path)
            costs.save(path)
            assert pe.Costs.load(path) == costs
        _use(r, costs)


def _costs_of_long_file(r: random.Random) -> None:
    size = 1 << r.randint(8, 20)
    text = one_of(
        r,
        (
            "[" * size,
            '{"forward": ' + "[" * size,
            '{"forward": ' + "[" * 900 + "]" * 900 + "}",
            '{"a": ' * size,
            f'{{"forward": [{",".join(["1"] * size)}]}}',
            f'{{"forward": {"9" * size}}}',
            f'{{"{"x" * size}": 1}}',
            '{"forward": "' + "x" * size + '"}',
            b"\xff" * size,
        ),
    )
    with _file(text) as path:
        pe.Costs.load(path)


def _use(r: random.Random, costs: pe.Costs) -> None:
    plan = pe.build_plan("1f1b", num_stages=2, microbatches=3, overlap=r.random() < 0.5, memory=costs)
    pe.simulate(plan, costs, noise=one_of(r, (0, 0.1)), seed=whole(r))


def _simulated(r: random.Random) -> None:
    names = r.sample(sorted(LISTED_BY), r.randint(0, 3))
    _use(r, pe.Costs(**{name: _cost(r) for name in names}))


def _searched(r: random.Random) -> None:
    num_ranks, trials = whole(r, 4), whole(r, 3) if r.random() < 0.9 else 10
    # Without a budget many trials, or a few orders of thousands of ranks, take as long as they are asked to.
    budgets = (None, 0.01, 0.0, -1.0) if num_ranks < 100 and trials < 100 else (0.01, 0.0, -1.0)
    search(
        pe.Costs(
            forward=one_of(r, (1.0, real(r))), latency=real(r), memory_limit=one_of(r, (None, None, real(r)))
        ),
        num_ranks=num_ranks,
        microbatches=one_of(r, (whole(r, 6), some(r, whole), junk(r))),
        chunks=one_of(r, ((1,), (1, 2), some(r, whole))),
        budget=one_of(r, budgets),
        trials=trials,
        seed=whole(r),
    )


_WORDS = (
    "1",
    "2",
    "4",
    "1,2",
    "0",
    "-1",
    "1e400",
    "nan",
    "inf",
    "9" * 5000,
    str(2**31),
    str(2**63),
    "",
    ",",
    "é",
    "x",
    "1" * 4000,
)


def _arguments(r: random.Random, flags: list[str]) -> list[str]:
    found = []
    for _ in range(r.randint(0, 5)):
        found.append(one_of(r, flags))
        if r.random() < 0.9:
            found.append(one_of(r, _WORDS))
    return found


def _plan_command(r: random.Random) -> None:
    with _file(csv(r), "order.csv") as order, _file(harmed(r, '{"forward": [1, 2], "latency": 0.5}')) as costs:
        flags = [
            "--schedule",
            "--ranks",
            "--chunks",
            "--microbatches",
            "--overlap",
            "--seed",
            "--csv",
            "--json",
            "--html",
        ]
        arguments = _arguments(r, flags + [flag for flag, _ in _COSTS.values()])
        arguments += one_of(
            r,
            (
                ["--from-csv", str(order)],
                ["--from-csv", one_of(r, ("none", "\0", "/", "/dev/zero", "/dev/null"))],
                ["--ranks", "2", "--microbatches", "3", "--schedule", schedule_name(r)],
                ["--ranks", "2", "--microbatches", "2,4", "--costs", str(costs)],
            ),
        )
        with contextlib.chdir(order.parent):
            _run(["plan", *arguments, *one_of(r, (["--trials", "2"], ["--budget", "20ms"]))])


def _run(arguments: list[str]) -> None:
    """Runs the command; asserts that it ends with a status, not with an exception."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            status = main(arguments)
        except SystemExit as end:  # argparse's
            status = end.code
    assert status in (0, 1, 2), status


def _train_command(r: random.Random) -> None:
    parser = argparse.ArgumentParser()
    train_options.add_arguments(parser)
    flags = [action.option_strings[0] for action in parser._actions if action.option_strings[0] != "-h"]
    with contextlib.redirect_stderr(io.StringIO()):
        try:
            options, _ = train_options.read_options(parser.parse_args(_arguments(r, flags)))
        except SystemExit:
            return
    options.engine()
    options.messages()
