"""Notices of failure between processes, in every order of their threads; see docs/protocol.md."""

import pytest
import turns
from turns import Queue, Store, Violation, choose, explore

from pipeline_ext.base import in_time
from pipeline_ext.errors import PeerError
from pipeline_ext.processes import failure, notices
from pipeline_ext.processes.failure import Failure
from pipeline_ext.processes.notices import Notices


@pytest.fixture(autouse=True)
def _in_turns(monkeypatch):
    for module in (in_time, failure, notices):
        monkeypatch.setattr(module, "threading", turns.THREADING)
    monkeypatch.setattr(in_time, "SimpleQueue", Queue)
    monkeypatch.setattr(notices, "prefixed", lambda prefix, store: store)
    monkeypatch.setattr(notices, "asked", lambda call, timeout: call())  # a store that is played answers


class Executor:
    """What tests/protocol shows of the core's: a failure stops the running step, or else the next one."""

    def __init__(self):
        self.error = None

    def fail(self, error):
        turns.world.stop_before(lambda: True)
        self.error = self.error or error


class Process:
    """A step: it sends, then waits for what the others send. At any moment it may fail."""

    def __init__(self, rank, size, store, everyone, failing):
        self.rank = rank
        self.everyone = everyone  # all processes
        self.outcome = ""
        self.sent = False
        self.executor = Executor()
        self.failure = Failure(Notices(store, "", rank, size, timeout=60.0), list(range(size)))
        self.failing = failing

    def run(self):
        self.failure.watch(self.executor)
        self.step()
        if self.outcome == "failed here":
            self.failure.tell("no")
        elif self.outcome == "failed":
            assert isinstance(self.executor.error, PeerError)
            self.failure.tell(f"{self.executor.error}")
        self.finish()
        self.failure.close()

    def step(self):
        if self.fails():
            return
        self.sent = True
        turns.world.stop_before(lambda: self.executor.error or all(each.sent for each in self.everyone))
        if self.executor.error is not None:
            self.outcome = "failed"
        elif not self.fails():
            self.outcome = "done"

    def fails(self):
        if self.rank in self.failing and choose(2) == 1:
            self.outcome = "failed here"
            return True
        return False

    def finish(self):
        """One that is done stays until the others have ended their step, as in a loop of steps."""
        if self.outcome == "done":
            turns.world.stop_before(
                lambda: self.executor.error or all(each.outcome == "done" for each in self.everyone)
            )


def scene_of(size, failing):
    def scene(world):
        store = Store()
        everyone = []
        everyone += [Process(rank, size, store, everyone, failing) for rank in range(size)]
        for process in everyone:
            turns.Thread(process.run, name=f"process {process.rank}").start()
        world.shared += [store, *everyone]
        for process in everyone:
            world.shared += [process.executor, process.failure, vars(process.failure)["_notices"]]

        def check():
            failed = [process.rank for process in everyone if process.outcome == "failed here"]
            for process in everyone:
                assert process.failure.is_known == bool(failed), (process.rank, process.outcome)
                if failed and process.rank not in failed:
                    error = process.failure.error
                    assert isinstance(error, PeerError) and f"process {process.rank} " not in f"{error}"

        return check

    return scene


@pytest.mark.parametrize(
    "size, failing",
    [(2, [0]), pytest.param(2, [0, 1], marks=pytest.mark.every)],
)
def test_all_hear_of_a_failure_whenever_it_comes(size, failing):
    explored = explore(scene_of(size, failing))
    print(size, failing, explored)
    assert explored.ends > 1


def test_a_notice_that_is_not_sent_is_found(monkeypatch):
    monkeypatch.setattr(Notices, "tell", lambda self, text: None)
    with pytest.raises(Violation, match="nobody can go on"):
        explore(scene_of(2, [0]))
