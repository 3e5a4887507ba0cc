"""One case of each fault of `make faults`; and faults of the engine itself, which make cases fail."""

import contextlib

import pytest
from faults.cases import Case, cases, short
from faults.cell import run_case
from faults.program import live, plain_training
from faults.run import run

import pipeline_ext.checkpoint.folder
import pipeline_ext.step.run
from pipeline_ext.base.lock import locked
from pipeline_ext.processes.notices import Notices


def test_one_case_of_each_fault_ends_as_documented():
    results, left_out = run(list(short()), jobs=4)
    assert [f"{result.case.name}: {text}" for result in results for text in result.wrong] == []
    assert len(results) + len(left_out) == len({case.fault for case in cases()})
    if left_out:
        pytest.skip("; ".join(f"{case.name}: {why}" for case, why in left_out))


def test_every_cell_is_run_or_has_a_reason():
    found = list(cases())
    assert len(found) == len(set(found)) == 13 * 14 * 4
    for case in found:
        assert case.why_not or case.expected


def tells_nobody(*args):
    Notices.tell = lambda self, text: None
    return live(*args)


def keeps_the_lock(*args):
    kept = contextlib.ExitStack()

    @contextlib.contextmanager
    def unreleased(held, *of_lock):
        kept.enter_context(locked(*of_lock))
        yield

    pipeline_ext.checkpoint.folder.taken = unreleased
    return live(*args)


def leaves_gradients(*args):
    pipeline_ext.step.run.give_up = lambda *of_step: None
    return live(*args)


@pytest.mark.parametrize(
    "planted, case, said",
    [
        (tells_nobody, Case("exception", "F", 1, 0), "no error of the others says"),
        (keeps_the_lock, Case("exception", "save", 0, 0), "save from one run at a time"),
        (leaves_gradients, Case("exception", "B", 1, 0), "gradients left of a step that failed"),
    ],
)
def test_a_fault_of_the_engine_makes_a_case_fail(planted, case, said, tmp_path):
    right = plain_training(tmp_path)
    assert run_case(case, tmp_path, right, in_nodes=False).wrong == []
    assert said in " ".join(run_case(case, tmp_path, right, in_nodes=False, body=planted).wrong)
