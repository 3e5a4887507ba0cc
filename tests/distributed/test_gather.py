"""What processes give one another is JSON and tensors, and comes as it was sent."""

import math
import pickle
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from processes import Gone, die, freeze, outcomes, run

import pipeline_ext as pe
from pipeline_ext.processes import gather

VALUES = ("text", {1: (2.5, None)}, [math.inf], torch.float16, "long" * 1000)
TENSORS = [
    torch.arange(6, dtype=torch.bfloat16).reshape(2, 3).t(),
    torch.empty(0, 2),
    torch.tensor(True),
    torch.tensor([1 + 2j]),
]


def exchanges():
    rank = dist.get_rank()
    assert gather.of_all(VALUES[rank]) == list(VALUES[: dist.get_world_size()])
    assert gather.from_first(rank) == 0
    pair = dist.new_group([1, 2])
    if rank in (1, 2):
        assert gather.of_all(rank, pair) == [1, 2]
        same(gather.from_one({"t": TENSORS} if rank == 2 else None, 1, pair), {"t": TENSORS})
    found = gather.to_first((rank, TENSORS[: rank + 1]))
    if rank:
        assert found is None
    else:
        same(found, [(n, TENSORS[: n + 1]) for n in range(dist.get_world_size())])
    same(gather.from_one(TENSORS if rank == 1 else None, 1), TENSORS)
    gather.wait_for_all()


def same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        same(list(a.items()), list(b.items()))
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b):
            same(one, other)
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    else:
        assert a == b


def test_values_and_tensors_of_three_processes():
    run(3, exchanges)


def refuses():
    odd = [object()] if dist.get_rank() == 1 else []
    for send in (gather.to_first, lambda value: gather.from_one(value, 1)):
        with pytest.raises(
            pe.InvalidArgument, match=r"process 1 sends cannot be sent: 'value\[0\]' is a object"
        ):
            send(odd)


def test_what_cannot_be_sent_is_refused_in_all_processes():
    run(2, refuses)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit",)


def hears_a_pickle():
    if dist.get_rank() == 1:
        gather.encode = lambda value: pickle.dumps(Evil())
    with pytest.raises(pe.PipelineError, match="another process sent what this one cannot read"):
        gather.of_all(1)


def test_a_pickle_is_not_read():
    run(2, hears_a_pickle)


def test_one_process_alone_gets_its_own():
    value = object()
    assert gather.of_all(value) == gather.to_first(value) == [value]
    assert gather.from_one(value, 0) is value


def loses_one(fault, limit):
    """Process 1 describes a tensor and does not send it; says who was to blame, and how the next call goes."""
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    backend.options._timeout = timedelta(seconds=limit)
    if dist.get_rank() == 1:
        gather.send = lambda *args: fault()
    began = time.monotonic()
    with pytest.raises(pe.PeerError) as failed:
        gather.to_first(torch.ones(4))
        gather.wait_for_all()  # where the processes that had nothing more to send hear of it
    return str(failed.value), time.monotonic() - began


@pytest.mark.parametrize("fault", [die, freeze])
def test_a_process_that_is_lost_between_tensors_is_named(fault):
    first, gone, third = outcomes(3, loses_one, fault, 4.0, timeout=60)
    assert isinstance(gone, Gone)
    for text, seconds in (first, third):
        assert "process 1" in text or "process 0" in text, text
        assert seconds < 20
    assert "process 1" in first[0]


def is_late():
    """Process 1 comes to the first call when the others have given it up, and they all call once more.

    What process 2 gave in the first call has not been read then.
    """
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    backend.options._timeout = timedelta(seconds=2)
    rank = dist.get_rank()
    gather.wait_for_all()
    store = dist.distributed_c10d._get_default_store()
    if rank == 1:
        store.wait(["given up"])
    with pytest.raises(pe.PeerError, match="process [01]"):
        gather.of_all(f"first {rank}")
    if rank == 0:
        store.set("given up", "")
    backend.options._timeout = timedelta(seconds=40)
    return gather.of_all(f"second {rank}")


def test_what_is_left_of_a_call_that_failed_is_not_taken_for_an_answer_to_the_next_one():
    assert run(3, is_late) == [["second 0", "second 1", "second 2"]] * 3
