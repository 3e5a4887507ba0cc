"""in_flight="auto" without act_memory: the first step measures what a microbatch takes at each stage."""

import contextlib
import io

import pytest
import torch
from reference import assert_same_gradients, gradients, reference_step, twin
from slot_cases import pipeline, product
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe
from pipeline_ext.stages.activation_memory import ActivationMemory

WIDTH, ROWS, MICROBATCHES = 16, 4, 12
RESULT = ROWS * WIDTH * 4  # bytes of one microbatch's float32[ROWS, WIDTH]
LOSS = 2 * 4  # a scalar, and the weighted one that is added to the total


class Keeps(nn.Module):
    """Saves for its backward ``count`` tensors that it makes, the last of which is its result."""

    def __init__(self, count):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))
        self.register_buffer("shift", torch.rand(WIDTH))
        self.count = count

    def forward(self, x):
        x = x * self.weight + self.shift  # saves x and the weight, neither made here; the product is dropped
        for _ in range(self.count):
            x = x.tanh()  # saves its result
        return x


def data(rows=ROWS * MICROBATCHES):
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH)


def model_of(*counts):
    return nn.Sequential(*map(Keeps, counts))


def test_bytes_are_those_that_stages_keep():
    with pipeline(model_of(1, 3, 2), MICROBATCHES, 1e9) as pipe:
        pipe.step(*data()[:1], target=data()[1])
        # What the stage before sent is kept too. The batch is there anyway.
        expected = [RESULT, RESULT + 3 * RESULT, RESULT + 2 * RESULT + LOSS]
        assert pipe.trace.act_memory == expected
        assert pipe.trace.profile().costs().act_memory == expected
        pipe.step(*data()[:1], target=data()[1])
        assert pipe.slot_choice.act_memory == expected
        assert pipe.trace.act_memory is None


@pytest.mark.parametrize("schedule, stages", [("1f1b", 3), ("zb-h1", 3), ("gpipe", 2), ("zbv", 4)])
def test_it_chooses_once_within_the_limit_and_trains_the_same(schedule, stages):
    model = model_of(*range(1, stages + 1))
    plain = twin(model)
    said = io.StringIO()
    with pipeline(model, MICROBATCHES, 40 * RESULT, schedule) as pipe:
        own = list(pipe.plan.limits)
        taken = 0
        for step in range(4):
            for module in (model, plain):
                module.zero_grad()
            x, y = data()
            with contextlib.redirect_stdout(said):
                pipe.step(x, target=y)
            reference_step(plain, x, y, MICROBATCHES, product)
            assert_same_gradients(model, gradients(plain))
            choice = pipe.slot_choice
            assert (choice is None) == (step == 0)
            if choice is None:
                assert pipe.plan.limits == own
                taken = pipe.trace.act_memory
            else:
                assert pipe.plan is choice.plan and pipe.plan.limits == choice.room
                assert peak_bytes(pipe.trace, taken) <= choice.most_memory <= 40 * RESULT
        assert said.getvalue() == f"{choice}\n"
        assert choice.own == own
        assert choice.room > own or schedule in ("gpipe", "zbv")


def peak_bytes(trace, taken):
    """The most that a rank held, by when its tasks began and ended; the last of a backward frees all."""
    last = "W" if any(task.kind == "W" for task in trace.tasks) else "B"
    most = 0
    for rank in range(trace.plan.num_ranks):
        held = [
            event
            for task in trace.tasks
            if task.rank == rank and task.kind in ("F", last)
            for event in [
                (task.begin, taken[task.stage]) if task.kind == "F" else (task.end, -taken[task.stage])
            ]
        ]
        total = 0
        for _, change in sorted(held):
            total += change
            most = max(most, total)
    return most


def test_a_limit_leaves_room_for_as_many_as_fit():
    by_limit = []
    for times in (2, 3, 5, 12):
        with pipeline(model_of(1, 1), MICROBATCHES, [times * RESULT, 1e9]) as pipe:
            for _ in range(2):
                x, y = data()
                pipe.step(x, target=y)
            # The first stage keeps its result alone.
            assert pipe.plan.limits[0] <= times
            assert pipe.trace.peak_in_flight_of_stage[0] <= times
            by_limit.append(pipe.slot_choice.room[0])
    assert by_limit == sorted(by_limit) and by_limit[0] == 2 and by_limit[-1] > 2


def test_the_first_step_ends_a_pipeline_whose_own_slots_do_not_fit():
    with pipeline(model_of(1, 1), MICROBATCHES, 2 * RESULT + LOSS - 1) as pipe:
        x, y = data()
        pipe.step(x, target=y)
        for _ in range(2):
            with pytest.raises(pe.InvalidSchedule) as refused:
                pipe.step(x, target=y)
            assert str(refused.value).startswith(
                f'in_flight="auto": one microbatch takes [{RESULT}, {2 * RESULT + LOSS}] bytes, by stage, as '
                f"the first step has measured, and with memory_limit={2 * RESULT + LOSS - 1} bytes the "
                "schedule holds too many; raise the limit, cut the batch into more microbatches, or name a "
                "schedule that holds fewer at once; if the limit is not in bytes, give act_memory too (rank 1, "
                f"cell 0 '1F0': the rank would hold {2 * RESULT + LOSS} of memory"
            )
        assert pipe.slot_choice is None


def test_a_step_that_fails_is_measured_again():
    model = model_of(1, 1)
    with pipeline(model, MICROBATCHES, 1e9) as pipe:
        x, y = data()
        handle = model[1].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(pe.StageError):
            pipe.step(x, target=y)
        handle.remove()
        pipe.step(x, target=y)
        assert pipe.slot_choice is None and pipe.trace.act_memory == [RESULT, 2 * RESULT + LOSS]
        pipe.step(x, target=y)
        assert pipe.slot_choice is not None


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.held = x.clone()  # not a saved tensor
        return x * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad * ctx.held


@pytest.mark.parametrize(
    "forward, kept",
    [
        (lambda x: x.tanh(), 1),
        (lambda x: x.tanh().view(-1)[:1] * 2, 1 + 4 / RESULT),  # the view's storage, and the result
        (Square.apply, 2),
        # What checkpoints keep to begin again at: the sine for the second, and its result.
        (lambda x: checkpoint(lambda s: s.tanh().tanh().tanh(), x.sin(), use_reentrant=False), 2),
        (lambda x: checkpoint(lambda s: s.tanh().tanh().tanh(), x.sin(), use_reentrant=True), 2),
        (lambda x: x + torch.tensor([1.0] * WIDTH), 1),  # the constant is not kept
        (lambda x: x * torch.tensor([1.0] * WIDTH), 1 + 4 * WIDTH / RESULT),  # this one is
        (lambda x: torch.sparse_coo_tensor([[0, 1], [0, 1]], [1.0, 1.0], (WIDTH, WIDTH)).mm(x.T).T, None),
    ],
)
def test_what_something_holds_counts_whoever_holds_it(forward, kept):
    x = torch.randn(ROWS, WIDTH, requires_grad=True)
    memory = ActivationMemory(2)
    with memory.of_forward(1):
        result = forward(x)
    assert result.requires_grad
    if kept is None:
        assert memory.by_stage[1] > RESULT
    else:
        assert memory.by_stage == [0, round(kept * RESULT)]
    with memory.of_forward(1):
        pass
    assert memory.by_stage[1] > 0  # the most so far


def test_compiled_stages_run_eagerly_in_the_first_step_and_compiled_later():
    compiled = torch.compile(Keeps(2), backend="aot_eager")
    model = nn.Sequential(Keeps(1), compiled)
    with pipeline(model, MICROBATCHES, 1e9) as pipe:
        x, y = data()
        pipe.step(x, target=y)
        assert pipe.trace.act_memory == [RESULT, 3 * RESULT + LOSS]
        pipe.step(x, target=y)
    assert "Compiled" in type(compiled(x).grad_fn).__name__
