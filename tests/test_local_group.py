"""Replicas of one process: what they reduce, and how they fail together."""

import gc
import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch

import pipeline_ext as pe
from pipeline_ext.reduction import local_group

SOON = 60.0  # far below what a hang would take


def members(size):
    group = pe.LocalGroup(size)
    return [group.member(rank) for rank in range(size)]


def reduced(tensors):
    """Reduces one tensor for each replica, in place."""
    for work in [m.all_reduce(t) for m, t in zip(members(len(tensors)), tensors)]:
        work.wait(SOON)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_mean_is_the_sum_in_the_order_of_the_replicas_divided(size, dtype):
    count = 2 * local_group._CHUNK + 3
    tensors = [torch.randn(count, dtype=dtype) * 10.0**rank for rank in range(size)]
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total = total + tensor
    for tensor in reduced(tensors):
        assert torch.equal(tensor, total / size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types_are_summed_in_float32_and_rounded_once(dtype):
    tensors = [torch.randn(1000).to(dtype) for _ in range(4)]
    exact = sum(tensor.float() for tensor in tensors) / 4
    for tensor in reduced(tensors):
        assert torch.equal(tensor, exact.to(dtype))


def test_a_sum_beyond_float16_still_has_its_mean():
    for tensor in reduced([torch.full((4,), 60000.0, dtype=torch.float16) for _ in range(3)]):
        assert torch.equal(tensor, torch.full((4,), 60000.0, dtype=torch.float16))


@pytest.mark.parametrize("shape", [(), (0,), (2, 3)])
def test_any_shape_is_reduced(shape):
    first, second = reduced([torch.ones(shape), torch.full(shape, 3.0)])
    assert torch.equal(first, torch.full(shape, 2.0)) and torch.equal(first, second)


def test_calls_belong_together_by_their_order():
    first, second = members(2)
    ours, theirs = [torch.full((3,), float(i)) for i in range(4)], [torch.zeros(3) for _ in range(4)]
    works = [first.all_reduce(tensor) for tensor in ours]
    works += [second.all_reduce(tensor) for tensor in theirs]
    for work in works:
        work.wait(SOON)
    for i in range(4):
        assert torch.equal(ours[i], torch.full((3,), i / 2)) and torch.equal(theirs[i], ours[i])


def test_a_call_returns_before_the_others_come():
    first, second = members(2)
    work = first.all_reduce(torch.ones(1))
    second.all_reduce(torch.ones(1))
    work.wait(SOON)
    assert work.ended <= time.monotonic_ns()


def test_tensors_of_other_sizes_or_types_fail_for_all():
    for other in (torch.ones(4), torch.ones(3, dtype=torch.float64)):
        first, second = members(2)
        works = [first.all_reduce(torch.ones(3)), second.all_reduce(other)]
        for work in works:
            with pytest.raises(pe.ReductionError, match=r"replica 0 reduces float32\[3\] where replica 1"):
                work.wait(SOON)


def test_an_abort_fails_for_all_and_for_good():
    first, second = members(2)
    work = first.all_reduce(torch.ones(3))
    first.check()
    second.abort(ValueError("no more"))
    second.abort(ValueError("the first reason stays"))
    for member in (first, second):
        with pytest.raises(pe.ReductionError, match="replica 1 failed with ValueError: no more; .* new"):
            member.check()
        with pytest.raises(pe.ReductionError, match="no more"):
            member.all_reduce(torch.ones(3)).wait(SOON)
    with pytest.raises(pe.ReductionError, match="no more"):
        work.wait(SOON)


def test_what_was_reduced_before_an_abort_stays():
    first, second = members(2)
    tensor = torch.ones(3)
    work = first.all_reduce(tensor)
    second.all_reduce(torch.zeros(3)).wait(SOON)
    second.abort(ValueError("later"))
    work.wait(SOON)
    assert torch.equal(tensor, torch.full((3,), 0.5))


def test_replicas_that_never_come_are_named():
    first, second, third = members(3)
    early = [first.all_reduce(torch.ones(3)), third.all_reduce(torch.ones(3))]
    with pytest.raises(pe.StepTimeout, match=r"replica 0 waited 0.05 seconds for replica 1;"):
        early[0].wait(0.05)
    late = second.all_reduce(torch.ones(3))
    for work in (early[1], late):
        with pytest.raises(pe.ReductionError, match="replica 0 waited 0.05 seconds"):
            work.wait(SOON)


@pytest.mark.parametrize("tensor", [torch.ones(3, dtype=torch.int64), torch.ones(4, 4).t()[1:]])
def test_tensors_that_cannot_be_reduced_are_refused(tensor):
    (member,) = members(1)
    with pytest.raises(pe.InvalidArgument, match="contiguous"):
        member.all_reduce(tensor)


def test_groups_and_ranks_that_cannot_be_are_refused():
    for size in (0, -1, 1.5, True, "2"):
        with pytest.raises(pe.InvalidArgument, match="size"):
            pe.LocalGroup(size)
    for rank in (-1, 2, None):
        with pytest.raises(pe.InvalidArgument, match="ranks are 0 to 1"):
            pe.LocalGroup(2).member(rank)


def test_a_tensor_is_let_go_when_it_has_been_reduced():
    (member,) = members(1)
    tensor = torch.ones(3)
    gone = threading.Event()
    weakref.finalize(tensor, gone.set)
    member.all_reduce(tensor).wait(SOON)
    del tensor
    assert gone.wait(SOON)


def test_the_thread_ends_with_the_group():
    def running():
        return [t for t in threading.enumerate() if t.name.startswith("pe reduction") and t not in before]

    before = threading.enumerate()
    first, second = members(2)
    work = first.all_reduce(torch.ones(1))
    second.all_reduce(torch.ones(1))
    work.wait(SOON)
    (thread,) = running()
    del first, second, work
    gc.collect()
    thread.join(SOON)
    assert not thread.is_alive()


def test_a_group_may_end_in_its_own_thread(monkeypatch):
    raised, before = [], set(threading.enumerate())
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: raised.append(str(unraisable.exc_value)))
    held, last = members(2), threading.Event()
    (thread,) = set(threading.enumerate()) - before
    work = held[0].all_reduce(torch.ones(1))
    work.future.add_done_callback(lambda _: last.wait(SOON) and held.clear())
    del work
    held[1].all_reduce(torch.ones(1))
    last.set()
    thread.join(SOON)
    assert not held and not thread.is_alive() and not raised


def test_replicas_go_on_when_the_main_thread_has_ended():
    code = """if True:
        import threading, time, torch, pipeline_ext as pe

        def replica(member):
            threading.main_thread().join()
            time.sleep(0.1)  # the interpreter waits for this thread
            tensor = torch.full((3,), float(member.rank))
            member.all_reduce(tensor).wait(60)
            print(tensor.tolist(), flush=True)

        group = pe.LocalGroup(2)
        for rank in range(2):
            threading.Thread(target=replica, args=(group.member(rank),)).start()
    """
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SOON)
    assert result.stdout.count("[0.5, 0.5, 0.5]") == 2 and not result.stderr and not result.returncode
