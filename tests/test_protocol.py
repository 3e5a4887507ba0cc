"""The protocol of a step, in every order in which threads can take turns; see docs/protocol.md."""

import os
import re
import subprocess

import pytest
from protocol_builds import Edit, build, build_with

import pipeline_ext as pe

MICROBATCHES = 3
every = pytest.mark.every

SCHEDULER, EXECUTOR = "schedule/list_scheduler.hpp", "runtime/host_executor.cpp"
DECIDED = "schedule/decided_order.hpp"
FAULTS = {
    "a count decremented twice": [
        Edit(
            SCHEDULER,
            "if (--missing_[task] == 0)",
            'if ((missing_[task] -= planted("a count decremented twice") && missing_[task] > 1 ? 2 : 1) == 0)',
        )
    ],
    "a slot given back early": [
        Edit(
            SCHEDULER,
            "  ++head_[best_queue];\n",
            '  ++head_[best_queue];\n  if (planted("a slot given back early") && plan_.frees_slot(best)) '
            "--in_flight_[slots_of(best)];\n",
        ),
        Edit(
            SCHEDULER,
            "    --in_flight_[slots_of(task)];\n",
            '    if (!planted("a slot given back early")) --in_flight_[slots_of(task)];\n',
        ),
    ],
    "a wake-up forgotten": [
        Edit(
            SCHEDULER,
            "== 0) wake(plan_.worker_of(task));",
            '== 0 && !planted("a wake-up forgotten")) wake(plan_.worker_of(task));',
        )
    ],
    "a group sent without its last result": [
        Edit(
            "plan/dependencies.cpp",
            "    TaskId last = 0;\n    for (int m = first; m < end; ++m) {",
            "    TaskId last = 0;\n"
            '    if (planted("a group sent without its last result") && end - first > 1) --end;\n'
            "    for (int m = first; m < end; ++m) {",
        )
    ],
    "a cancellation looked for before a task only": [
        Edit(
            EXECUTOR,
            "  std::vector<int> to_wake;\n  const auto",
            "  std::vector<int> to_wake;\n  bool saw = false;\n  const auto",
        ),
        Edit(
            EXECUTOR,
            "step && !step->stopping ?",
            'step && !(planted("a cancellation looked for before a task only") ? saw : step->stopping) ?',
        ),
        Edit(
            EXECUTOR,
            "    lock.unlock();\n    for (const int worker : to_wake)",
            "    saw = step && step->stopping;\n    lock.unlock();\n    for (const int worker : to_wake)",
        ),
    ],
    "a failure before a step forgotten": [
        Edit(
            EXECUTOR,
            "if (!s.early_error)",
            'if (!s.early_error && !planted("a failure before a step forgotten"))',
        )
    ],
    "a failed step remembered": [
        Edit(
            EXECUTOR,
            "  s.early.clear();\n",
            '  s.early.clear();\n  if (planted("a failed step remembered")) s.early_error = result.error;\n',
        )
    ],
    "a decision that wakes nobody": [
        Edit(
            EXECUTOR,
            "  s.work[0].notify_one();",
            '  if (!planted("a decision that wakes nobody")) s.work[0].notify_one();',
        )
    ],
    "what is ready taken before what is decided": [
        Edit(
            DECIDED,
            "return head == decided;",
            'return planted("what is ready taken before what is decided") || head == decided;',
        )
    ],
    "an order turned round": [
        Edit(
            "plan/plan.cpp",
            "    std::stable_sort(",
            '    if (planted("an order turned round")) std::reverse(mine.begin(), mine.end());\n'
            "    std::stable_sort(",
        )
    ],
}


def explore(program, schedule, planted="", microbatches=MICROBATCHES, stages=2, **settings):
    """The states and transitions found, and what is violated with the way there."""
    reactive, overlap = (bool(settings.get(name)) for name in ("reactive", "overlap"))
    plan = pe.build_plan(
        schedule, num_stages=stages, microbatches=microbatches, reactive=reactive, overlap=overlap
    )
    cells = "/".join(",".join(actions) for actions in plan.order().values())
    numbers = [f"{name}={number:d}" for name, number in settings.items()]
    ran = subprocess.run(
        [program, cells, *numbers],
        env={**os.environ, "PLANTED": planted},
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert ran.returncode in (0, 1), ran.stdout + ran.stderr
    found = re.search(r"(\d+) states, (\d+) transitions, (\d+) ends, longest way (\d+)$", ran.stdout.rstrip())
    print(schedule, settings, found[0])
    violated = ran.stdout.partition("violated: ")[2].partition("\n")[0]
    return int(found[1]), int(found[2]), violated, ran.stdout


@pytest.fixture(scope="module")
def program():
    return build()


@pytest.fixture(scope="module")
def faulty():
    return build_with(FAULTS)


SCHEDULES = ["gpipe", "1f1b", "zb-h1"]
EVENTS = [
    {"polls": True},
    {"spurious": True},
    {"fail": 1, "steps": 2},
    {"interrupt": 1, "steps": 2},
    {"tell": 1, "steps": 2},
    {"close": 1},
    {"interrupt": 2},
    {"late": 1},
    pytest.param({"fail": 2, "steps": 2}, marks=every),
    pytest.param({"fail": 1, "tell": 1, "interrupt": 1}, marks=every),
    pytest.param({"fail": 1, "close": 1, "spurious": 1}, marks=every),
]


@pytest.mark.parametrize("events", EVENTS, ids=str)
@pytest.mark.parametrize("reactive", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ranks_of_one_process_keep_the_rules(program, schedule, reactive, events):
    pack = 2 if schedule == "gpipe" else 1
    states, _, violated, text = explore(program, schedule, reactive=reactive, pack=pack, **events)
    assert not violated, text
    assert states > 200


@pytest.mark.parametrize(
    "schedule, events",
    [
        ("gpipe", {"pack": 2}),
        pytest.param("zb-h1", {}, marks=every),
        pytest.param("1f1b", {"fail": 1}, marks=every),
    ],
)
def test_streams_of_a_rank_that_overlap_keep_the_rules(program, schedule, events):
    _, _, violated, text = explore(program, schedule, reactive=True, overlap=True, **events)
    assert not violated, text


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("schedule, pack", [("1f1b", 1), ("gpipe", 2), ("zb-h1", 1)])
def test_a_process_keeps_the_rules_whatever_the_other_does(program, schedule, pack, rank):
    _, _, violated, text = explore(program, schedule, alone=rank, pack=pack, tell=True)
    assert not violated, text
    _, _, violated, text = explore(program, schedule, alone=rank, pack=pack, fail=1, steps=2)
    assert not violated, text


@pytest.mark.parametrize(
    "schedule, events",
    [("gpipe", {"pack": 2}), pytest.param("1f1b", {}, marks=every), pytest.param("zb-h1", {}, marks=every)],
)
def test_two_processes_keep_the_rules_together(program, schedule, events):
    _, _, violated, text = explore(program, schedule, apart=True, **events)
    assert not violated, text


@pytest.mark.parametrize("steps", [1, pytest.param(2, marks=every)])
def test_when_one_of_two_processes_fails_both_return(program, steps):
    _, _, violated, text = explore(program, "1f1b", microbatches=1, apart=True, fail=1, steps=steps)
    assert not violated, text


FOLLOWS = {"follow": True, "reactive": True}
FAILS = {"fail": 1, "steps": 2}


@pytest.mark.parametrize(
    "rank, microbatches, events",
    [
        (0, 3, {}),
        (1, 2, {}),
        (0, 1, FAILS),
        pytest.param(1, 3, {}, marks=every),
        pytest.param(0, 2, FAILS, marks=every),
    ],
)
def test_a_process_that_follows_keeps_the_rules_whatever_is_decided(program, rank, microbatches, events):
    _, _, violated, text = explore(program, "1f1b", microbatches=microbatches, alone=rank, **FOLLOWS, **events)
    assert not violated, text


MEMBERS = {"members": 2, "reactive": True}  # of each of the two ranks


@pytest.mark.parametrize(
    "schedule, stages, limit",
    [("gpipe", 2, 3), ("1f1b", 2, 2), ("1f1b", 2, 3), ("zb-h1", 2, 3), ("interleaved-1f1b", 4, 3)],
)
def test_groups_of_which_one_member_decides_never_wait_for_ever(program, schedule, stages, limit):
    states, _, violated, text = explore(program, schedule, stages=stages, limit=limit, **MEMBERS)
    assert not violated, text
    assert states > 1000


@pytest.mark.parametrize("fault", [1, 2], ids=["a follower decides by itself", "a leader tells late"])
def test_a_member_of_a_group_that_breaks_the_rule_is_found(program, fault):
    _, _, violated, text = explore(program, "gpipe", fault=fault, **MEMBERS)
    assert "nobody can go on" in violated, text


FINDINGS = [
    ("a count decremented twice", "1f1b", {}, "begins before"),
    ("a slot given back early", "1f1b", {"overlap": True, "reactive": True}, "one too many in flight"),
    ("a wake-up forgotten", "1f1b", {}, "nobody can go on"),
    ("a group sent without its last result", "gpipe", {"pack": 2}, "begins before"),
    ("a cancellation looked for before a task only", "1f1b", {"fail": 1}, "although its thread has seen"),
    ("a failure before a step forgotten", "1f1b", {"alone": 0, "tell": True}, "although its thread has seen"),
    ("a failed step remembered", "1f1b", {"fail": 1, "steps": 2}, "of which nothing has failed"),
    ("an order turned round", "gpipe", {"reactive": True}, "out of order"),
    ("a decision that wakes nobody", "1f1b", {"alone": 0, **FOLLOWS}, "nobody can go on"),
    ("what is ready taken before what is decided", "1f1b", {"alone": 0, **FOLLOWS}, "out of the decided order"),
]


@pytest.mark.parametrize("fault, schedule, settings, finding", FINDINGS)
def test_a_planted_fault_is_found(faulty, fault, schedule, settings, finding):
    assert fault in FAULTS
    _, _, violated, text = explore(faulty, schedule, fault, **settings)
    assert finding in violated, text
    _, _, violated, text = explore(faulty, schedule, **settings)
    assert not violated, text


def test_a_notice_that_is_not_sent_is_found(program):
    _, _, violated, text = explore(program, "1f1b", microbatches=1, apart=True, fail=1, mute=True)
    assert "nobody can go on" in violated, text
