"""K results, one message: the same gradients, exactly so many messages, and no more memory than it takes."""

import itertools
import math
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from models import chain, tree, tree_batch, tree_loss
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.plan.build import layout_of
from pipeline_ext.transport import buffers

pytestmark = pytest.mark.usefixtures("short_searches")
PLACES = [("gpipe", 4, None), ("1f1b", 4, None), ("interleaved-1f1b", 4, None), ("interleaved-1f1b", 6, None)]


def assert_trains_as_plain(pipe, model, plain, x, y, loss_fn, steps=3):
    for _ in range(steps):
        model.zero_grad()
        plain.zero_grad()
        expected = reference_step(plain, x, y, pipe.microbatches, loss_fn)
        assert torch.equal(pipe.step(x, target=y), expected)
        assert_same_gradients(model, gradients(plain))


def messages(pipe):
    """(boundary, direction) -> messages counted where they are sent."""
    return {(m.boundary, m.direction): m.count for m in pipe.trace.messages}


@pytest.mark.parametrize("reactive", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule, stages, devices", PLACES)
def test_equal_to_plain_autograd_for_every_k(schedule, stages, devices, overlap, reactive):
    model, x, y = chain(layers=6), torch.randn(19, 12), torch.randn(19, 12)
    plain = twin(model)
    for pack in (*range(1, 9), "all", "auto", {0: 2, 2: 5}):
        with pe.Pipeline(
            model, stages, 8, schedule, F.mse_loss,
            devices=devices, overlap=overlap, reactive=reactive, pack=pack,
        ) as pipe:  # fmt: skip
            assert_trains_as_plain(pipe, model, plain, x, y, F.mse_loss, steps=5)
            for boundary, k in enumerate(pipe.plan.packs):
                assert messages(pipe)[boundary, "backward"] == math.ceil(8 / k)
                assert messages(pipe)[boundary, "forward"] == 8


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule, stages, devices", PLACES[:3])
@pytest.mark.parametrize("pack, pack_forward", [(1, 2), (2, 3), (3, "all"), ("all", "all"), ({1: 4}, {0: 3})])
def test_activations_of_many_tensors_leave_together(schedule, stages, devices, overlap, pack, pack_forward):
    model = tree(layers=4)
    plain, (x, y) = twin(model), tree_batch(17)
    with pe.Pipeline(
        model, stages, 7, schedule, tree_loss,
        devices=devices, overlap=overlap, pack=pack, pack_forward=pack_forward,
    ) as pipe:  # fmt: skip
        assert_trains_as_plain(pipe, model, plain, x, y, tree_loss)
        for boundary, (k, k_forward) in enumerate(zip(pipe.plan.packs, pipe.plan.packs_forward)):
            assert messages(pipe)[boundary, "backward"] == math.ceil(7 / k)
            assert messages(pipe)[boundary, "forward"] == math.ceil(7 / k_forward)
        assert pipe.plan.num_messages == sum(messages(pipe).values())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_is_packed_gradients_are_the_same(data):
    layouts = {name: layout_of(name, 1, 1) for name in pe.schedule_names()}
    schedule = data.draw(st.sampled_from([name for name in layouts if layouts[name] != "bidirectional"]))
    ranks, microbatches = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 9))
    stages = ranks if layouts[schedule] == "linear" else 2 * ranks
    ks = st.one_of(
        st.integers(1, microbatches),
        st.just("all"),
        st.dictionaries(st.integers(0, max(0, stages - 2)), st.integers(1, microbatches)),
    )
    settings = {
        "pack": data.draw(ks) if stages > 1 else 1,
        "pack_forward": data.draw(ks) if stages > 1 else 1,
        "overlap": data.draw(st.booleans()),
        # An order that was searched for is kept or refused, as one that is given.
        "reactive": schedule == "zb-auto" or data.draw(st.booleans()),
    }
    rows = microbatches + data.draw(st.integers(0, 7))
    model, (x, y) = tree(layers=6), tree_batch(rows)
    with pe.Pipeline(
        model, stages, microbatches, schedule, tree_loss, devices=["cpu"] * ranks, **settings
    ) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y, tree_loss, steps=2)
        homes = pipe.plan.rank_of_stage
        counted = {m[:2]: m.count for m in pipe.trace.messages}
        for direction, packs in (("backward", pipe.plan.packs), ("forward", pipe.plan.packs_forward)):
            for boundary, (k, here, there) in enumerate(zip(packs, homes, homes[1:])):
                if here != there:
                    assert counted[boundary, direction] == math.ceil(microbatches / k)


def test_a_schedule_given_as_text_packs_too():
    rows = [
        ["0F0", "0F1", "0F2", "0F3", "0B0", "0B1", "0B2", "0B3"],
        ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2", "1F3", "1B3"],
    ]
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    for reactive, pack in itertools.product((False, True), (1, 2, 3, 4)):
        with pe.Pipeline(model, 2, 4, rows, F.mse_loss, reactive=reactive, pack=pack) as pipe:
            assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss, steps=1)
            assert messages(pipe)[0, "backward"] == math.ceil(4 / pack)
            if not reactive:
                assert pipe.plan.order() == dict(enumerate(rows))


def test_groups_leave_with_the_one_that_runs_last():
    rows = [["0F0", "0F1", "0F2", "0F3", "0B3", "0B2", "0B1", "0B0"],
            ["1F0", "1F1", "1F2", "1F3", "1B3", "1B2", "1B1", "1B0"]]  # fmt: skip
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    with pe.Pipeline(model, 2, 4, rows, F.mse_loss, pack=2) as pipe:
        pipe.step(x, target=y)
        found = gradients(model)
    model.zero_grad()
    with pe.Pipeline(model, 2, 4, rows, F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert_same_gradients(model, found)


def test_stages_of_one_rank_send_no_messages():
    with pe.Pipeline(chain(), 4, 6, "interleaved-1f1b", F.mse_loss, devices=["cpu"], pack=3) as pipe:
        pipe.step(torch.randn(6, 12), target=torch.randn(6, 12))
        assert pipe.trace.messages == []
        assert pipe.plan.num_messages == 0
        assert pipe.plan.packs == [1, 1, 1]


# -- what may be in a message


class Awkward(nn.Module):
    """Hands on tensors of every kind, which depend on a first layer and are all used by the last."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        h = self.layer(x)
        wide = torch.cat([h, h.sin()], dim=1)
        return {
            "transposed": h.t(),
            "gaps": wide[:, :6],
            "expanded": h[:, :1].expand(-1, 4),
            "scalar": h.sum(),
            "none": h[:0],
            "double": h.double(),
            "half": h.to(torch.float16),
            "bfloat16": h.bfloat16(),
            "complex": torch.complex(h, h * 2).conj(),
            "ids": torch.arange(len(h)),
            "mask": h > 0,
            "text": ("as it is", None, 3),
            "twice": (h, h),
        }


def use(values):
    total = values["transposed"].t().float()
    for name in ("gaps", "half", "bfloat16", "double"):
        total = total + values[name].float() * values[name].float()
    total = total + values["expanded"].sum(1, keepdim=True) + values["scalar"] + values["none"].sum()
    total = total + values["complex"].real - values["complex"].imag
    total = total * values["mask"] + values["ids"][:, None]
    assert values["text"] == ("as it is", None, 3)
    assert values["twice"][0] is values["twice"][1]
    return total + values["twice"][0]


class Use(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, values):
        return self.layer(use(values))


@pytest.mark.parametrize("pack, pack_forward", [(1, 1), (2, 1), (1, 2), (3, 2), ("all", "all")])
def test_tensors_of_every_kind(pack, pack_forward):
    model, x, y = nn.Sequential(Awkward(), Use()), torch.randn(11, 6), torch.randn(11, 6)
    with pe.Pipeline(model, 2, 5, loss_fn=F.mse_loss, pack=pack, pack_forward=pack_forward) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss)


def test_what_is_received_has_the_sender_s_strides():
    seen = []

    class Look(nn.Module):
        def forward(self, values):
            seen.append({name: v.stride() for name, v in values.items() if isinstance(v, torch.Tensor)})
            return use(values)

    with pe.Pipeline([Awkward(), Look()], microbatches=2, loss_fn=F.mse_loss, pack_forward=2) as pipe:
        pipe.step(torch.randn(10, 6), target=torch.randn(10, 6))
    sent = {name: v.stride() for name, v in Awkward()(torch.randn(5, 6)).items() if isinstance(v, torch.Tensor)}
    assert seen == [sent, sent]


def test_changes_in_place_reach_no_other_microbatch():
    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2).relu_()

    model = nn.Sequential(nn.Linear(4, 4), InPlace(), nn.Linear(4, 4))
    x, y = torch.randn(9, 4), torch.randn(9, 4)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, cuts=["1"], pack=2, pack_forward=2) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss)


class Views(nn.Module):
    """Hands on a tensor and views of it."""

    def __init__(self, grad):
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.grad = grad

    def forward(self, x):
        h = self.layer(x)
        seen = h if self.grad else h.detach() * 2
        return {"h": h, "x": seen, "flat": seen.view(-1), "tail": seen[:, 4:], "head": seen[:, :4]}


class Write(nn.Module):
    def __init__(self, to, read):
        super().__init__()
        self.to, self.read = to, read

    def forward(self, values):
        values[self.to].mul_(2)
        return values["h"] + values[self.read].reshape(-1)[: values["h"].numel() // 6].sum()


@pytest.mark.parametrize("pack_forward", [1, 2])
@pytest.mark.parametrize("to, read", [("x", "flat"), ("flat", "x"), ("x", "tail"), ("tail", "flat")])
def test_changes_in_place_reach_views_of_the_same_memory(to, read, pack_forward):
    model = nn.Sequential(Views(grad=False), Write(to, read))
    x, y = torch.randn(9, 6), torch.randn(9, 6)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, pack_forward=pack_forward) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss)
    model = nn.Sequential(Views(grad=True), Write(to, read))
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, pack_forward=pack_forward) as pipe:
        with pytest.raises(pe.StageError, match="shares memory with another one handed over"):
            pipe.step(x, target=y)


@pytest.mark.parametrize("pack_forward", [1, 2])
def test_parts_that_do_not_overlap_may_be_changed_in_place(pack_forward):
    class Halves(nn.Module):
        def forward(self, x):
            x = x * 2
            return x[:, :3], x[:, 3:]

    class Join(nn.Module):
        def forward(self, halves):
            left, right = halves
            return torch.cat([left.mul_(2), right.relu_()], 1)

    model = nn.Sequential(nn.Linear(6, 6), Halves(), Join())
    x, y = torch.randn(9, 6), torch.randn(9, 6)
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, cuts=["2"], pack=2, pack_forward=pack_forward) as pipe:
        assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss)


def test_what_is_handed_on_from_any_offset_gives_the_same_bits():
    class Pass(nn.Module):
        def forward(self, x):
            return x

    model = nn.Sequential(Pass(), nn.Linear(6, 6))
    for rows in (7, 9, 11):
        x, y = torch.randn(rows * 6 + 1)[1:].view(rows, 6), torch.randn(rows, 6)
        with pe.Pipeline(model, 2, 5, loss_fn=F.mse_loss, pack_forward=2) as pipe:
            assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss)


def test_sparse_tensors_are_refused_with_advice():
    class Sparse(nn.Module):
        def forward(self, x):
            return x.to_sparse()

    class Dense(nn.Module):
        def forward(self, x):
            return x.to_dense()

    stages = [nn.Sequential(nn.Linear(3, 3), Sparse()), Dense()]
    with pe.Pipeline(stages, microbatches=2, loss_fn=F.mse_loss, pack_forward=2) as pipe:
        with pytest.raises(pe.StageError, match="only plain dense tensors can; give pack=1"):
            pipe.step(torch.randn(4, 3), target=torch.randn(4, 3))


def test_rows_may_change_from_step_to_step():
    model = chain()
    plain = twin(model)
    with pe.Pipeline(model, 4, 5, loss_fn=F.mse_loss, pack=2, pack_forward=3) as pipe:
        for rows in (10, 5, 23, 7, 10):
            x, y = torch.randn(rows, 12), torch.randn(rows, 12)
            assert_trains_as_plain(pipe, model, plain, x, y, F.mse_loss, steps=1)


# -- memory


@pytest.fixture
def allocations(monkeypatch):
    """The buffers that were made."""
    made = []

    def empty(*args, **kwargs):
        made.append(torch.empty(*args, **kwargs))
        return made[-1]

    class Torch:
        def __getattr__(self, name):
            return empty if name == "empty" else getattr(torch, name)

    monkeypatch.setattr(buffers, "torch", Torch())
    return made


IN_TWO_PARTS = [[f"{s}{kind}{m}" for kind in "FIW" for m in range(12)] for s in range(4)]


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved-1f1b", IN_TWO_PARTS])
@pytest.mark.parametrize("wire", [None, torch.bfloat16, torch.float8_e4m3fn])
def test_buffers_are_used_again(schedule, wire, allocations):
    with pe.Pipeline(
        tree(), 4, 12, schedule, tree_loss, pack=2, pack_forward=2, wire=wire, wire_forward=wire
    ) as pipe:
        x, y = tree_batch(24)
        for _ in range(2):
            pipe.step(x, target=y)
        made = len(allocations)
        assert made > 0
        for _ in range(10):
            pipe.step(x, target=y)
        assert len(allocations) == made


def test_what_arrives_is_a_view_of_the_message(allocations):
    seen = []

    class Look(nn.Module):
        def forward(self, x):
            seen.append(x.data_ptr())
            x.register_hook(lambda grad: None)
            return x * 2

    with pe.Pipeline([nn.Linear(5, 5), Look()], microbatches=6, loss_fn=F.mse_loss, pack_forward=3) as pipe:
        pipe.step(torch.randn(12, 5), target=torch.randn(12, 5))
    whole = [(buffer.data_ptr(), buffer.data_ptr() + buffer.numel()) for buffer in allocations]
    assert len(seen) == 6
    assert all(any(begin <= address < end for begin, end in whole) for address in seen)


def test_a_gradient_that_someone_keeps_is_not_overwritten():
    class Keep(nn.Module):
        """Its parameter's gradient is the message's memory, if autograd takes what it is given."""

        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(3, 4))

        def forward(self, x):
            return x + self.bias.view(-1).view(3, 4)

    model = nn.Sequential(nn.Linear(4, 4), Keep(), nn.Linear(4, 4))
    x, y = torch.randn(12, 4), torch.randn(12, 4)
    with pe.Pipeline(model, 3, 4, loss_fn=F.mse_loss, pack=2) as pipe:
        kept = []
        for _ in range(4):
            assert_trains_as_plain(pipe, model, twin(model), x, y, F.mse_loss, steps=1)
            kept.append((model[1].bias.grad, model[1].bias.grad.clone()))
        assert all(torch.equal(grad, copy) for grad, copy in kept)


# -- limits


def test_too_few_microbatches_in_flight_are_refused_with_the_limit_it_takes():
    layers = [nn.Linear(2, 2) for _ in range(4)]
    for pack in (2, 3, 5, 8):
        with pytest.raises(pe.InvalidSchedule, match=rf"allow {pack} in flight at each stage"):
            pe.Pipeline(layers, microbatches=8, loss_fn=F.mse_loss, pack=pack, in_flight=pack - 1)
        with pe.Pipeline(layers, microbatches=8, loss_fn=F.mse_loss, pack=pack, in_flight=pack) as pipe:
            pipe.step(torch.randn(8, 2), target=torch.randn(8, 2))
            assert max(pipe.trace.peak_in_flight_of_stage) <= pack


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["gpipe", "1f1b", "interleaved-1f1b"]),
    st.integers(1, 4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 12),
    st.booleans(),
)
def test_the_limit_named_is_the_smallest_that_works(schedule, ranks, m, k, k_forward, overlap):
    stages = 2 * ranks if schedule == "interleaved-1f1b" else ranks
    packs = [min(k, m)] * (stages - 1)
    packs_forward = [min(k_forward, m)] * (stages - 1)

    def ends(limit):
        try:
            plan = pe.build_plan(
                schedule, num_stages=stages, microbatches=m, num_ranks=ranks, overlap=overlap,
                packs=packs, packs_forward=packs_forward, in_flight=[limit] * stages,
            )  # fmt: skip
        except pe.InvalidSchedule as error:
            return int(str(error).split("allow ")[1].split(" ")[0])
        assert max(pe.simulate(plan).peak_in_flight_of_stage) <= limit
        return None

    needed = [ends(limit) for limit in range(1, m + 1)]
    smallest = next(limit for limit, refused in enumerate(needed, 1) if refused is None)
    assert all(named in (None, smallest) for named in needed)
    assert all(named is None for named in needed[smallest - 1 :])


class Slow(nn.Module):
    """Takes much longer than a wake-up."""

    def forward(self, x):
        time.sleep(0.006)
        x.register_hook(lambda grad: time.sleep(0.012))
        return x * 1


@pytest.mark.parametrize("in_flight", [4, 6, None])
@pytest.mark.parametrize("pack", [2, 4])
def test_the_simulator_and_a_real_run_agree_on_who_waits(pack, in_flight):
    stages = [nn.Sequential(nn.Linear(2, 2), Slow()) for _ in range(3)]
    with pe.Pipeline(stages, microbatches=8, loss_fn=F.mse_loss, pack=pack, in_flight=in_flight) as pipe:
        x, y = torch.randn(8, 2), torch.randn(8, 2)
        pipe.step(x, target=y)
        simulation = pe.simulate(pipe.plan, pe.Costs(forward=6.0, backward=12.0))
        assert pipe.trace.order() == simulation.order()
        assert pipe.trace.peak_in_flight_of_stage == simulation.peak_in_flight_of_stage


def test_a_stage_that_may_hold_too_few_is_named():
    def refused(**settings):
        with pytest.raises(pe.InvalidSchedule) as caught:
            pe.build_plan("1f1b", num_stages=4, microbatches=8, **settings)
        return str(caught.value)

    assert "(2 at stage 1)" in refused(packs=[1, 4, 1], in_flight=[8, 2, 8, 8])
    text = refused(packs=[1, 4, 1], in_flight=[3, 2, 1, 1])
    assert "(3 at stage 0, 2 at stage 1)" in text and "allow 4" in text
    assert pe.build_plan("1f1b", num_stages=4, microbatches=8, packs=[1, 4, 1], in_flight=[4, 4, 1, 1])


def test_limits_are_raised_where_results_wait_and_nowhere_else():
    def plan(packs, room=()):
        return pe.build_plan("1f1b", num_stages=4, microbatches=64, reactive=True, packs=packs, room=room)

    tight, roomy = plan([8, 1, 1]), plan([8, 1, 1], room=[16, 7, 4, 1])
    assert tight.limits == [16, 3, 2, 1] and roomy.limits == [16, 7, 4, 1]
    assert pe.simulate(tight).makespan == pe.simulate(roomy).makespan
    assert plan([1, 1, 2]).limits == plan([2, 2, 2]).limits == [8, 6, 4, 1]


def test_without_packs_the_order_is_what_needs_more():
    rows = [[f"{s}{kind}{m}" for kind in "FB" for m in (range(4) if kind == "F" else range(3, -1, -1))]
            for s in range(2)]  # fmt: skip
    with pytest.raises(pe.InvalidSchedule, match="its order needs more; allow 4 .*another order") as caught:
        pe.build_plan(rows, num_stages=2, microbatches=4, reactive=True, in_flight=2)
    assert "pack" not in str(caught.value)


def test_limits_may_be_an_array():
    for limits in ([3, 1], (3, 1), np.array([3, 1]), torch.tensor([3, 1])):
        with pe.Pipeline(
            [nn.Linear(2, 2)] * 2, microbatches=4, loss_fn=F.mse_loss, pack=3, in_flight=limits
        ) as pipe:
            assert pipe.plan.limits == [3, 1]


ROWS = [["0F0", "0F1", "0F2", "0B0", "0B1", "0B2"], ["1F0", "1B0", "1F1", "1B1", "1F2", "1B2"]]


@pytest.mark.parametrize("settings", [{}, {"in_flight": [3, 1]}, {"packs": [2]}, {"packs": [3]}])
def test_without_reaction_an_order_is_run_exactly_as_it_was_given(settings):
    plan = pe.build_plan(ROWS, num_stages=2, microbatches=3, reactive=False, **settings)
    assert plan.order() == dict(enumerate(ROWS))


@pytest.mark.parametrize(
    "rows, settings, text",
    [
        (ROWS, {"in_flight": 2}, "holds 3 microbatches at stage 0, in_flight allows 2; .*reactive=True"),
        (ROWS, {"packs": [3], "in_flight": 2}, "holds 3 microbatches at stage 0, in_flight allows 2"),
        (
            [["0F0", "0F1", "0B0", "0F2", "0B1", "0B2"], ROWS[1]],
            {"packs": [3]},
            "order given the step would never end, .*; pack fewer, give another order, .*reactive=True",
        ),
        (
            [["0F0", "0B0", "0F1", "0F2", "0B1", "0B2"], ["1F0", "1F1", "1F2", "1B0", "1B1", "1B2"]],
            {"packs": [3]},
            "this schedule never ends",
        ),
    ],
)
def test_or_it_is_refused(rows, settings, text):
    with pytest.raises(pe.InvalidSchedule, match=text):
        pe.build_plan(rows, num_stages=2, microbatches=3, reactive=False, **settings)


# -- what is refused


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"packs": [1]}, r"packs is \[1\]; .* from 1 to the 4 microbatches, one for each of the 2 boundaries"),
        ({"packs": [0, 0]}, r"packs is \[0, 0\]"),
        ({"packs_forward": [-1, 1, 1, 1]}, r"packs_forward is \[-1, 1, 1, 1\]"),
        ({"packs": [1, 5]}, r"packs is \[1, 5\]"),
        ({"packs": 2}, "packs is 2; give a list"),
        ({"in_flight": "3"}, "in_flight is '3'"),
        ({"room": [1, 2]}, r"room is \[1, 2\]; .*one for each of the 3 stages"),
        ({"microbatches": 0}, "microbatches is 0"),
    ],
)
def test_numbers_that_no_plan_can_have(settings, text):
    with pytest.raises(pe.InvalidArgument, match=text):
        pe.build_plan("1f1b", **{"num_stages": 3, "microbatches": 4, **settings})


def test_a_limit_may_be_one_for_all_stages():
    assert pe.build_plan("gpipe", num_stages=3, microbatches=4, in_flight=3).limits == [3, 3, 3]


@pytest.mark.parametrize(
    "settings, text",
    [
        ({"pack": 0}, 'pack is 0; give a number from 1 to the 4 microbatches, "all" of them, "auto"'),
        ({"pack": 5}, "pack is 5; give a number from 1 to the 4"),
        ({"pack": True}, "pack is True"),
        ({"pack_forward": "some"}, "pack_forward is 'some'"),
        ({"pack": {1: 2}}, "pack names the boundary 1; boundary b is between stages b and b \\+ 1"),
        ({"pack": {0: "auto"}}, "pack at boundary 0 is 'auto'; give a number .* or leave it out"),
        ({"pack": np.array([2, 2])}, "pack is array"),
        ({"wire": torch.int8}, "wire is torch.int8; give one of torch.float64"),
        ({"wire_forward": {0: "bf16"}}, "wire_forward is 'bf16'"),
        ({"in_flight": 0}, "in_flight is 0"),
        (
            {"in_flight": [1, 2, 3]},
            r"in_flight is \[1, 2, 3\]; .* a list of one for each of the 2 stages, or \"auto\"",
        ),
        ({"in_flight": {0: 2}}, "in_flight is {0: 2}; .* a list"),
        ({"in_flight": [2, 0]}, r"in_flight is \[2, 0\]; give a whole number of at least 1"),
        ({"in_flight": -1}, "in_flight is -1; give a whole number of at least 1"),
    ],
)
def test_settings_that_cannot_be_used(settings, text):
    with pytest.raises(pe.InvalidArgument, match=text):
        pe.Pipeline([nn.Linear(2, 2)] * 2, microbatches=4, loss_fn=F.mse_loss, **settings)


def test_a_schedule_that_lists_its_sends_packs_nothing():
    rows = [["0F0", "0SEND_F0", "0F1", "0SEND_F1", "0RECV_B0", "0B0", "0RECV_B1", "0B1"],
            ["1RECV_F0", "1F0", "1B0", "1SEND_B0", "1RECV_F1", "1F1", "1B1", "1SEND_B1"]]  # fmt: skip
    with pytest.raises(pe.InvalidSchedule, match="lists its sends.*leave out SEND and RECV, or pack=1"):
        pe.Pipeline([nn.Linear(2, 2)] * 2, microbatches=2, schedule=rows, loss_fn=F.mse_loss, pack=2)
