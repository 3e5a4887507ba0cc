"""Hostile input is refused in a sentence: no crash, no hang, no error that is not the package's."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.nn.functional as F
from hostile.children import Subject, survey
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C
from pipeline_ext.base import texts
from pipeline_ext.cli import main
from pipeline_ext.plan.search import search

LEFT_OUT = ["0UNSHARD", "0RESHARD", "0REDUCE_GRAD"]  # of a plan's numbers: they are of no microbatch


@pytest.fixture
def plan():
    return _C.make_plan("1f1b", 2, 2, 3)


@pytest.mark.parametrize("action", LEFT_OUT)
@pytest.mark.parametrize("is_file", [True, False])
def test_an_order_of_no_microbatch_is_refused(action, is_file, tmp_path):
    (tmp_path / "order.csv").write_text(f"{action}\n")
    order = tmp_path / "order.csv" if is_file else [[action]]
    with pytest.raises(pe.InvalidSchedule, match="actions of whole stages only .* as in 0F0, 0B0"):
        pe.build_plan(order, num_stages=2, microbatches=1)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(pe.InvalidSchedule, match="actions of whole stages only"):
        pe.Pipeline(model, num_stages=2, microbatches=1, schedule=order, loss_fn=F.mse_loss)


def test_the_command_shows_that_an_order_of_no_microbatch_is_not_possible(tmp_path, capsys):
    (tmp_path / "order.csv").write_text("0UNSHARD\n")
    assert main(["plan", "--from-csv", str(tmp_path / "order.csv")]) == 1
    assert (
        "order.csv is not possible: the schedule holds actions of whole stages only" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "cell", ["0F2147483647", "2147483647F0", "0F99999999999", "(" + "0F0;" * 99 + "0B0)OVERLAP_F_B"]
)
def test_numbers_and_pairs_that_are_too_large_are_no_actions(cell):
    with pytest.raises(pe.InvalidSchedule, match="is not an action"):
        pe.build_plan([[cell]], num_stages=1, microbatches=1)


def test_an_error_shows_the_begin_of_a_long_text():
    with pytest.raises(pe.InvalidSchedule) as refused:
        pe.build_plan([["é" * 10_000, "\ud800"]], num_stages=1, microbatches=1)
    assert "é...' is not an action" in str(refused.value) and len(str(refused.value)) < 500


def test_a_deadlock_of_many_ranks_is_explained_in_a_page():
    eager, slow = "{0}F0 {0}F1 {0}B0 {0}B1", "{0}F0 {0}B0 {0}F1 {0}B1"
    rows = [(eager if stage % 2 else slow).format(stage).split() for stage in range(5000)]
    with pytest.raises(pe.InvalidSchedule, match="and more ranks") as refused:
        pe.build_plan(rows, num_stages=5000, microbatches=2)
    assert str(refused.value).count("\n") < 200


@pytest.mark.parametrize(
    "sizes, said",
    [
        ({"num_ranks": 0}, "num_ranks is 0; give a whole number of at least 1"),
        ({"num_ranks": -1}, "num_ranks is -1; give"),
        ({"num_ranks": 10**9}, "num_ranks is 1000000000; give a whole number from 1 to 32768"),
        ({"num_stages": 10**5}, "100000 stages are more than the 32768 that a plan holds"),
        ({"microbatches": 10**9}, "more tasks than the 33554432 that a plan holds; give fewer"),
        ({"microbatches": 10**5000}, "microbatches is a number of thousands of digits"),
        ({"memory": 3}, "memory is 3; give a Costs"),
    ],
)
def test_sizes_that_no_plan_has_are_refused(sizes, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.build_plan("1f1b", **{"num_stages": 2, "microbatches": 4, **sizes})


def test_a_thousand_of_threads_is_the_most(capsys):
    assert main(["train", "--threads", "100000"]) == 2
    assert "--threads is 100000; give from 1 to 1024" in capsys.readouterr().err


def test_no_more_workers_than_a_process_can_run():
    with pytest.raises(pe.InvalidSchedule, match="at most 1024 workers, a thread each, got 5000; give fewer"):
        _C.HostExecutor(["worker"] * 5000)


@pytest.mark.parametrize(
    "method", ["action", "describe", "dependencies", "successors", "num_sent", "num_messages_of"]
)
def test_a_task_that_the_plan_does_not_have_is_an_index_error(plan, method):
    with pytest.raises(IndexError, match="task is 12; give a number from 0 to 11"):
        getattr(plan, method)(len(plan))


def test_a_body_or_a_result_for_what_the_plan_does_not_have_is_an_index_error(plan):
    with pytest.raises(IndexError, match="stage is 2; give a number from 0 to 1"):
        _C.Program(plan, {(2, "F"): print})
    executor = _C.HostExecutor(["worker"], 0)
    executor.deliver(12, 0, [0])
    with pytest.raises(IndexError, match="results of task 12 have arrived, and the plan has 12 tasks"):
        executor.run(_C.Program(plan, {}), timeout=5)
    with pytest.raises(RuntimeError, match="the plan has no rank 7"):
        _C.HostExecutor(["worker"], 7).run(_C.Program(plan, {}), timeout=5)


def test_streams_are_asked_for_ops_that_they_have(plan):
    costs = pe.Costs().by_stage(2, 2)
    laid = _C.StreamPlan(plan, costs, _C.simulate(plan, costs), [0, 1])
    for ask in (lambda: laid.op_of(12), lambda: laid.sent_by(12), lambda: laid.first_after(99, 0)):
        with pytest.raises(IndexError, match="give a number from 0 to"):
            ask()
    with pytest.raises(IndexError, match="stream is -1"):
        laid.first_after(0, -1)


def test_times_of_another_plan_are_refused(plan):
    other = _C.make_plan("1f1b", 2, 2, 9)
    costs = pe.Costs().by_stage(2, 2)
    times = _C.simulate(other, costs)
    for ask in (
        lambda: _C.end_times(plan, costs, times),
        lambda: _C.simulated_order(plan, times),
        lambda: _C.StreamPlan(plan, costs, times, [0, 0]),
    ):
        with pytest.raises(pe.InvalidSchedule, match="the times are of another plan"):
            ask()


def test_an_order_to_start_a_search_from_is_of_the_same_step():
    costs = pe.Costs().by_stage(2, 2)
    for order in ([["1F0"], ["0F0"]], [["0F0"], ["1F0"]], [["0F0"], ["9F0"]]):
        with pytest.raises(pe.InvalidSchedule, match="an order to start from"):
            _C.search_zero_bubble(
                [0, 1], 2, 1, costs, span=True, templates=[order], work=10, seconds=1.0, seed=0, threads=1
            )


@pytest.mark.parametrize(
    "given, said",
    [
        ({"forward": "fast"}, "forward is 'fast'; give a number, or a list of one for each stage"),
        ({"forward": None}, "forward is None; give a number"),
        ({"latency": [0, [1]]}, r"latency is \[0, \[1\]\]; give a number, or a list of one for each boundary"),
        ({"backward": 10**400}, "backward is a number of thousands of digits|backward is 1000"),
        ({"contention": [1.0]}, r"contention is \[1.0\]; give a number$"),
        ({"mem_i": {}}, "mem_i is {}; give"),
    ],
)
def test_what_is_no_cost_is_refused_when_it_is_given(given, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        pe.Costs(**given)


@pytest.mark.parametrize(
    "text, said",
    [
        ("[" * 100_000, "nest lists too deeply"),
        ('{"forward": ' + "[" * 600 + "]" * 600 + "}", "'forward' in .* holds"),
        ('{"forward": 1' + "0" * 400 + "}", "'forward' in .* is 1000.*; give a finite number"),
        ('{"forward": ' + "9" * 9999 + "}", "are not JSON"),
        (json.dumps({"x" * 9999: 1}), "^'x{59} in .* is not a cost"),
    ],
)
def test_a_file_of_costs_is_refused_whatever_it_holds(text, said, tmp_path):
    (tmp_path / "costs.json").write_text(text)
    with pytest.raises(pe.InvalidArgument, match=said) as refused:
        pe.Costs.load(tmp_path / "costs.json")
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("path", ["\0", "/", "/dev/zero", "/proc/self/mem"])
def test_a_path_that_is_no_text_is_refused(path, monkeypatch):
    monkeypatch.setattr(texts, "MOST_BYTES", 1 << 20)
    with pytest.raises(pe.InvalidArgument, match="cannot be read|longer than 1 MiB"):
        pe.Costs.load(path)
    with pytest.raises(pe.InvalidArgument, match="cannot be read|longer than 1 MiB"):
        pe.build_plan(Path(path), num_stages=1, microbatches=1)


def test_a_search_refuses_numbers_that_are_none():
    for given in (
        {"microbatches": None},
        {"microbatches": 4, "chunks": ["x"]},
        {"microbatches": 4, "seed": -1},
        {"microbatches": 4, "trials": -(2**63)},
    ):
        with pytest.raises(pe.InvalidArgument, match=r"(microbatches|chunks|seed|trials) is"):
            search(pe.Costs(), **{"num_ranks": 2, "trials": 1, **given})


def test_a_rule_that_never_ends_is_refused_where_results_are_packed():
    with pytest.raises(pe.InvalidSchedule, match="this schedule never ends"):
        _C.plan_of_rule("bidirectional", ["I", "F", "W"], [3, 4], 2, 3, packs_forward=[3])


def interrupted(work):
    """Seconds from Ctrl-C, a third of a second after the begin of ``work``, to KeyboardInterrupt."""
    sent = []

    def send():
        sent.append(time.monotonic())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(0.33, send)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        return time.monotonic() - sent[0]
    finally:
        timer.join()


@pytest.mark.parametrize("schedule", ["an order", "1f1b", "zb-auto"])
def test_ctrl_c_is_seen_while_a_large_plan_is_made(schedule):
    size = {"num_stages": 8, "microbatches": 1_500_000 if schedule == "1f1b" else 100_000}
    if schedule == "an order":
        schedule = _C.make_plan("1f1b", 8, 8, 100_000).order()
    # Within 0.2 s on a machine with nothing else to do.
    assert interrupted(lambda: pe.build_plan(schedule, **size)) < 3


def test_nothing_that_is_called_with_hostile_input_fails():
    command = [sys.executable, "-m", "hostile.run", "--seconds", "12", "--seed", "0"]
    here = Path(__file__).parent
    path = os.pathsep.join([str(here.parent), *filter(None, sys.path)])
    ran = subprocess.run(
        command, cwd=here, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    cases, subjects = map(int, re.search(r"(\d+) cases of (\d+) subjects", ran.stdout).groups())
    assert cases >= subjects > len(vars(_C))


def test_a_crash_and_a_wrong_error_are_faults_with_their_seeds():
    def crash(chance):
        os.kill(os.getpid(), signal.SIGSEGV)

    subjects = [
        Subject("crash", crash, ()),
        Subject("wrong", lambda chance: {}["key"], (ValueError,)),
        Subject("right", lambda chance: int("x"), (ValueError,)),
    ]
    found = survey(subjects, 0.0, seed=5)
    assert set(found.faults) == {("crash", "SIGSEGV"), ("wrong", "KeyError")}
    assert "seed 5: Fatal Python error: Segmentation fault" in found.faults["crash", "SIGSEGV"]
