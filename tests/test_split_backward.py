"""I and W as tasks of their own: the gradients of B, bit for bit, and nothing computed or kept for longer."""

import gc
import threading
import time
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from models import (
    AtOnce,
    Attention,
    Constant,
    Images,
    Recomputed,
    Repeated,
    Residual,
    Slices,
    chain,
    tree,
    tree_batch,
    tree_loss,
)
from reference import assert_same_gradients, gradients, reference_step, twin
from replicas import Replicas, batches, reference_replicas
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pipeline_ext as pe
from pipeline_ext.stages.split_backward import find_input_gradients, run_backward


def late(stages, microbatches, whole=lambda stage, m: False):
    """Cells for a stage on each rank: forwards, then each I, with its W one microbatch later, or a B."""
    rows = []
    for s in range(stages):
        row, waiting = [f"{s}F{m}" for m in range(microbatches)], []
        for m in range(microbatches):
            if whole(s, m):
                row, waiting = [*row, *waiting, f"{s}B{m}"], []
            else:
                row, waiting = [*row, f"{s}I{m}", *waiting], [f"{s}W{m}"]
        rows.append(row + waiting)
    return rows


def last(stages, microbatches):
    """Cells in which every W comes after every I."""
    return [[f"{s}{kind}{m}" for kind in "FIW" for m in range(microbatches)] for s in range(stages)]


def alternating(stages, microbatches):
    """Cells with one forward and one I in turn, and each W right after."""
    rows = []
    for s in range(stages):
        ahead = min(stages - s, microbatches)
        row = [f"{s}F{m}" for m in range(ahead)]
        for m in range(microbatches):
            row += [f"{s}I{m}"] + [f"{s}F{m + ahead}"] * (m + ahead < microbatches) + [f"{s}W{m}"]
        rows.append(row)
    return rows


def some_whole(stages, microbatches):
    """Cells that list B at some stages, and for some microbatches of others."""
    return late(stages, microbatches, whole=lambda s, m: s % 3 == 1 or (s + m) % 3 == 0)


ORDERS = [late, last, alternating, some_whole]
MODES = [{"reactive": r, "overlap": o} for r in (False, True) for o in (False, True)]


def case(make):
    if make is chain:
        return chain(), torch.randn(11, 12), torch.randn(11, 12), F.mse_loss
    x, y = tree_batch(11)
    return tree(), x, y, tree_loss


def check(model, x, y, schedule, loss_fn=F.mse_loss, stages=None, microbatches=4, steps=3, **options):
    """Steps along ``schedule``; gradients add up as those of the plain model. Returns ``unsplit_stages``."""
    model.zero_grad()
    plain = twin(model)
    with pe.Pipeline(model, stages, microbatches, schedule, loss_fn, **options) as pipe:
        for _ in range(steps):
            expected = reference_step(plain, x, y, microbatches, loss_fn)
            assert torch.equal(pipe.step(x, target=y), expected)
            assert_same_gradients(model, gradients(plain))
        pipe.eval(x)
        return pipe.unsplit_stages


# -- equal to B


@pytest.mark.parametrize("options", MODES, ids=str)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("make", [chain, tree], ids=["chain", "tree"])
def test_equal_to_plain_autograd_whatever_the_order_and_the_mode(make, order, options):
    for stages in (1, 2, 4):
        model, x, y, loss_fn = case(make)
        assert not check(model, x, y, order(stages, 4), loss_fn, stages, steps=5, **options)


PACKS = [{"pack": 2}, {"pack": "all", "pack_forward": 3}, {"pack": 3, "overlap": True}]


@pytest.mark.parametrize("options", PACKS, ids=str)
@pytest.mark.parametrize("order", [late, some_whole])
@pytest.mark.parametrize("make", [chain, tree], ids=["chain", "tree"])
def test_input_gradients_travel_in_packs(make, order, options):
    model, x, y, loss_fn = case(make)
    assert not check(model, x, y, order(4, 5), loss_fn, 4, 5, **options)


def test_other_types_on_the_wire_give_what_they_give_with_whole_backwards():
    model, x, y, loss_fn = case(chain)
    found = []
    for schedule in (late(2, 4), some_whole(2, 4), "gpipe"):
        stages = twin(model)
        wires = {"wire": torch.bfloat16, "wire_forward": torch.bfloat16, "pack": 2}
        with pe.Pipeline(stages, 2, 4, schedule, loss_fn, **wires) as pipe:
            pipe.step(x, target=y)
            found.append(gradients(stages))
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


def test_several_stages_on_a_rank():
    model, x, y, loss_fn = case(chain)
    first, second, third, fourth = late(4, 4)
    order = [[*first[:4], *third, *first[4:]], [*second[:4], *fourth, *second[4:]]]
    assert not check(model, x, y, order, loss_fn, 4)


LAYERS = {
    "a weight used twice": lambda: Repeated(2),
    "writes to slices": Slices,
    "parts of one parameter": Attention,
    "convolutions and batch norm": Images,
    "a weight made of others": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(12, 12)),
    "no parameters": nn.Tanh,
    "nothing at all": nn.Identity,
    "a layer in place": lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(12, 12)),
    "a parameter handed on": lambda: nn.Sequential(Constant(), Constant(), Product()),
}


class Product(nn.Module):
    def forward(self, pair):
        return pair[0] * pair[1]


@pytest.mark.parametrize("name", LAYERS)
def test_modules_of_all_sorts(name):
    make = LAYERS[name]
    x, y = torch.randn(11, 12), torch.randn(11, 12)
    for stages in ([make(), make(), nn.Linear(12, 12)], [nn.Linear(12, 12), make(), make()]):
        for options in MODES[::3]:
            assert not check(nn.Sequential(*stages), x, y, late(3, 4), cuts=[1, 2], **options)


def test_cuts_between_a_parameter_handed_on_and_its_use():
    model = nn.Sequential(nn.Linear(12, 12), Constant(), Constant(), Product())
    assert not check(model, torch.randn(9, 12), torch.randn(9, 12), late(4, 4), stages=4)


@pytest.mark.parametrize("frozen", [[0], [1], [2], [0, 1], [0, 2], [1, 2]])
def test_a_frozen_stage_loses_no_other_stages_gradients(frozen):
    model = nn.Sequential(*(Residual(12) for _ in range(3)))
    for stage in frozen:
        model[stage].requires_grad_(False)
    assert not check(model, torch.randn(9, 12), torch.randn(9, 12), late(3, 4), stages=3)


def test_some_parameters_of_a_stage_frozen():
    model = nn.Sequential(*(Residual(12) for _ in range(2)))
    for stage in model:
        stage.norm.requires_grad_(False)
        stage.up.weight.requires_grad_(False)
    assert not check(model, torch.randn(9, 12), torch.randn(9, 12), late(2, 4), stages=2)


def test_losses_of_stages_and_a_loss_that_is_a_module():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(12, 12), nn.Parameter(torch.tensor(0.5))

        def forward(self, x):
            # One loss that leads to the input, and at the next stage one that leads to a parameter alone.
            return pe.WithLoss(self.layer(x), x.mean() * self.scale if x.requires_grad else self.scale.square())

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.0))

        def forward(self, out, target):
            return F.mse_loss(out * self.scale, target)

    x, y = torch.randn(8, 12), torch.randn(8, 12)
    for schedule in ("gpipe", late(3, 4), some_whole(3, 4)):
        torch.manual_seed(0)
        model, loss_fn = nn.Sequential(*(Auxiliary() for _ in range(3))), Scaled()
        with pe.Pipeline(model, 3, 4, schedule, loss_fn) as pipe:
            loss = pipe.step(x, target=y)
            found = {**gradients(model), "loss": loss, "of the loss": loss_fn.scale.grad}
        if schedule == "gpipe":
            expected = found
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_inputs_that_require_a_gradient_get_theirs():
    model, x, y = chain(), torch.randn(8, 12, requires_grad=True), torch.randn(8, 12)
    plain, z = twin(model), x.detach().clone().requires_grad_()
    for a, b in zip(z.tensor_split(4), y.tensor_split(4)):
        (F.mse_loss(plain(a), b) * (len(a) / 8)).backward()
    with pe.Pipeline(model, 2, 4, late(2, 4), F.mse_loss) as pipe:
        pipe.step(x, target=y)
    assert torch.equal(x.grad, z.grad)
    assert_same_gradients(model, gradients(plain))


def test_parameters_held_by_several_stages():
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(3)))
    model[2].weight = model[0].weight
    x, y = torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    reference_step(plain, x, y, 4, F.mse_loss)
    for options in MODES:
        model.zero_grad()
        with pe.Pipeline(model, 3, 4, late(3, 4), F.mse_loss, **options) as pipe:
            pipe.step(x, target=y)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


def test_sparse_gradients():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = nn.Embedding(9, 12, sparse=True), nn.Linear(12, 12)

        def forward(self, x):
            ids = x.detach().argsort(1).remainder(9)
            return self.layer(x) + self.table(ids).sum(1)

    model = nn.Sequential(Table(), Table())
    x, y = torch.randn(9, 12), torch.randn(9, 12)
    plain = twin(model)
    reference_step(plain, x, y, 4, F.mse_loss)
    with pe.Pipeline(model, 2, 4, late(2, 4), F.mse_loss) as pipe:
        pipe.step(x, target=y)
    for p, q in zip(model.parameters(), plain.parameters()):
        assert torch.equal(p.grad.to_dense(), q.grad.to_dense())


def test_hooks_on_tensors_and_parameters_are_called_once():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Linear(12, 24), nn.Linear(24, 12)
            self.calls = Counter()
            self.up.weight.register_hook(self.double("parameter"))
            self.up.weight.register_post_accumulate_grad_hook(lambda p: self.calls.update(["accumulated"]))

        def double(self, name):
            def hook(grad):
                self.calls[name] += 1
                return grad * 2

            return hook

        def forward(self, x):
            h = self.up(x)
            h.register_hook(self.double("tensor"))
            return self.down(h.tanh())

    x, y = torch.randn(8, 12), torch.randn(8, 12)
    found = []
    for schedule in ("gpipe", late(2, 4)):
        torch.manual_seed(0)
        model = nn.Sequential(Hooked(), Hooked())
        with pe.Pipeline(model, 2, 4, schedule, F.mse_loss) as pipe:
            pipe.step(x, target=y)
        found.append(gradients(model))
        assert all(stage.calls == {"parameter": 4, "tensor": 4, "accumulated": 1} for stage in model)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_autocast():
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    found = []
    for schedule in ("gpipe", late(2, 4)):
        stages = twin(model)
        with pe.Pipeline(stages, 2, 4, schedule, F.mse_loss) as pipe, torch.autocast("cpu", torch.bfloat16):
            pipe.step(x, target=y)
            assert not pipe.unsplit_stages
        found.append(gradients(stages))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_gradient_on_its_way_back_shares_no_memory_with_what_w_still_reads():
    class AddFlat(nn.Module):
        """The parameter's gradient is a view of the output's, and so is the input's."""

        def __init__(self):
            super().__init__()
            self.flat, self.scale = nn.Parameter(torch.randn(24)), nn.Parameter(torch.randn(12))

        def forward(self, x):
            return (x + self.flat.view_as(x)) * 1 + x * self.scale

    model = nn.Sequential(AddFlat(), AddFlat(), AddFlat())
    x, y = torch.randn(8, 12), torch.randn(8, 12)
    plain = twin(model)
    expected = [torch.zeros_like(p) for p in plain.parameters()]
    for a, b in zip(x.tensor_split(4), y.tensor_split(4)):
        loss = F.mse_loss(plain(a), b) * (2 / 8)
        for total, grad in zip(expected, torch.autograd.grad(loss, list(plain.parameters()))):
            total += grad
    for order in (late, last, some_whole):
        model.zero_grad()
        with pe.Pipeline(model, 3, 4, order(3, 4), F.mse_loss) as pipe:
            pipe.step(x, target=y)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected))


# -- what does not come apart


UNSPLIT = {
    "Python": (AtOnce, "ScaledProductBackward, in Python"),
    "reentrant": (lambda: Recomputed(True), "a reentrant checkpoint"),
    "checkpoint": (lambda: Recomputed(False), "recomputed"),
    "compiled": (lambda: torch.compile(Residual(12), backend="aot_eager"), "a compiled module"),
    "recurrent": (lambda: Repeated(3), "used more than twice"),
}


@pytest.mark.parametrize("options", MODES[::3], ids=str)
@pytest.mark.parametrize("name", UNSPLIT)
def test_a_stage_that_cannot_be_split_runs_whole_at_i_and_the_pipeline_says_why(name, options):
    make, why = UNSPLIT[name]
    model = nn.Sequential(make(), nn.Linear(12, 12), make())
    found = check(model, torch.randn(9, 12), torch.randn(9, 12), late(3, 4), stages=3, **options)
    # The first stage has no gradient to hand back: all of its backward is W.
    assert found.keys() == {2} and why in found[2]


def test_gradients_are_put_by_until_w():
    model = nn.Sequential(nn.Linear(12, 12), AtOnce())
    seen = []
    model[0].weight.register_hook(lambda grad: seen.append(model[1].weight.grad))
    order = [["0F0", "1F0", "1I0", "0B0", "1W0"]]
    with pe.Pipeline(model, 2, 1, order, F.mse_loss, reactive=False) as pipe:
        pipe.step(torch.randn(2, 12), target=torch.randn(2, 12))
    assert seen == [None] and model[1].weight.grad is not None


# -- nothing twice, and nothing for longer than it is needed


class Operations(TorchDispatchMode):
    """Counts what is computed."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def test_i_computes_no_weight_gradient_and_w_nothing_again():
    stage, x = nn.Sequential(Residual(12), Residual(12), nn.Tanh(), nn.Linear(12, 12)), torch.randn(6, 12)

    def begin():
        received = x.clone().requires_grad_()
        out = stage(received)
        return received, out, torch.ones_like(out)

    received, out, grad = begin()
    with Operations() as whole:
        run_backward([out], [grad])
    received, out, grad = begin()
    with Operations() as i:
        rest = find_input_gradients([out], [grad], [received])
    with Operations() as w:
        rest.add()
    assert whole.counts["mm"] == 10 and i.counts["mm"] == w.counts["mm"] == 5
    for name in ("gelu_backward", "tanh_backward"):
        assert i.counts[name] == whole.counts[name] and w.counts[name] == 0
    assert i.counts["sum"] == 0 and w.counts["sum"] == whole.counts["sum"] == 5  # of biases


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_recomputes_once_per_microbatch(reentrant):
    stages = [Recomputed(reentrant) for _ in range(3)]
    with pe.Pipeline(stages, microbatches=4, schedule=late(3, 4), loss_fn=F.mse_loss) as pipe:
        pipe.step(torch.randn(8, 12), target=torch.randn(8, 12))
    # A reentrant checkpoint recomputes only where its input requires a gradient: not in the first stage.
    assert [stage.forwards for stage in stages] == [4 if reentrant else 8, 8, 8]


class Watched(nn.Module):
    """Two layers and a function between; tells which of their inputs are alive."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 12)
        self.refs = {}

    def forward(self, x):
        hidden = self.first(x)
        bent = F.gelu(hidden)
        self.refs = {"hidden": weakref.ref(hidden), "bent": weakref.ref(bent)}
        return self.last(bent)

    def alive(self):
        return {name for name, ref in self.refs.items() if ref() is not None}


@pytest.mark.parametrize("options", MODES, ids=str)
def test_what_only_i_needs_is_gone_after_i_and_the_rest_after_w(options):
    stages = [nn.Linear(12, 12), Watched(), nn.Linear(12, 12)]
    seen = []
    stages[0].weight.register_hook(lambda grad: seen.append(stages[1].alive()))
    stages[2].weight.register_hook(lambda grad: seen.append(stages[1].alive()))
    order = [["0F0", "1F0", "2F0", "2I0", "1I0", "0B0", "1W0", "2W0"]]
    gc.disable()  # what goes, goes by itself
    try:
        with pe.Pipeline(stages, microbatches=1, schedule=order, loss_fn=F.mse_loss, **options) as pipe:
            pipe.step(torch.randn(2, 12), target=torch.randn(2, 12))
    finally:
        gc.enable()
    assert seen == [{"bent"}, set()]


def test_a_slot_is_free_after_w_and_not_before():
    stages = [nn.Linear(12, 12) for _ in range(2)]
    with pe.Pipeline(stages, microbatches=6, schedule=last(2, 6), loss_fn=F.mse_loss, reactive=False) as pipe:
        pipe.step(torch.randn(6, 12), target=torch.randn(6, 12))
        assert pipe.trace.peak_in_flight_of_stage == [6, 6]
    with pe.Pipeline(
        stages, microbatches=6, schedule=alternating(2, 6), loss_fn=F.mse_loss, in_flight=2
    ) as pipe:
        pipe.step(torch.randn(6, 12), target=torch.randn(6, 12))
        assert max(pipe.trace.peak_in_flight_of_stage) <= 2


# -- what surrounds a step


@pytest.mark.parametrize("order", [late, last, some_whole])
def test_replicas_hold_the_mean(order):
    for make in (Residual, lambda width: AtOnce()):
        model = nn.Sequential(*(make(12) for _ in range(3)))
        plains = [twin(model), twin(model)]
        with Replicas(model, 3, 4, order(3, 4), F.mse_loss) as replicas:
            for _ in range(4):
                parts = batches(9)
                for other in (replicas, *plains):
                    other.zero_grad()
                reference_replicas(plains, parts, 4, F.mse_loss)
                replicas.step(parts)
                for mine, plain in zip(replicas.models, plains):
                    assert_same_gradients(mine, gradients(plain))


@pytest.mark.parametrize("task, kind", [("1I2", "input gradient"), ("1W2", "weight gradient")])
def test_an_error_names_the_task_and_the_next_step_works(task, kind):
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    plain, left = twin(model), [3]
    reference_step(plain, x, y, 4, F.mse_loss)

    def fail(*_):
        left[0] -= 1
        if left[0] == 0:
            raise ValueError("no")

    layer = model[12]
    if "W" in task:
        layer.weight.register_hook(fail)
    else:
        layer.register_forward_hook(lambda module, args, out: out.register_hook(fail) and None)
    with pe.Pipeline(model, 2, 4, late(2, 4), F.mse_loss) as pipe:
        model(x).sum().backward()  # there are gradients
        left[0] = 3
        with pytest.raises(pe.StageError, match=f"{task}, the {kind} of microbatch 2 at stage 1") as caught:
            pipe.step(x, target=y)
        assert isinstance(caught.value.__cause__, ValueError)
        assert all(p.grad is None for p in model.parameters())
        pipe.step(x, target=y)
        assert_same_gradients(model, gradients(plain))


def test_a_whole_backward_that_was_given_up_leaves_no_gradient():
    class Hangs(AtOnce):
        def forward(self, x):
            x.register_hook(lambda grad: (let_go.wait(30), ended.set())[2:] or None)  # the last to be called
            return super().forward(x)

    let_go, ended = threading.Event(), threading.Event()
    model = nn.Sequential(nn.Linear(12, 12), Hangs())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    pipe = pe.Pipeline(model, 2, 1, late(2, 1), F.mse_loss, timeout=0.2)
    with pytest.raises(pe.StepTimeout, match="1I0"):
        pipe.step(torch.randn(2, 12), target=torch.randn(2, 12))
    let_go.set()
    assert ended.wait(10)
    time.sleep(0.2)
    assert all(p.grad is None for p in model.parameters())


def test_profile_and_trace_know_both_parts():
    model, x, y = chain(), torch.randn(8, 12), torch.randn(8, 12)
    with pe.Pipeline(model, 3, 4, late(3, 4, whole=lambda s, m: s == 1), F.mse_loss) as pipe:
        pipe.step(x, target=y)
        profile, costs = pipe.profile(), pipe.profile().costs(pipe.plan)
        assert {task.kind for task in pipe.trace.tasks} == set("FBIW")
        assert profile.input_grad[1] == profile.weight_grad[1] == profile.backward[1] / 2
        for stage in (0, 2):
            assert profile.backward[stage] == profile.input_grad[stage] + profile.weight_grad[stage] > 0
        assert (costs.input_grad, costs.weight_grad) == (profile.input_grad, profile.weight_grad)
        assert pipe.simulate().makespan > 0
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss) as pipe:
        pipe.step(x, target=y)
        assert pipe.profile().input_grad is pipe.profile().weight_grad is None


# -- schedules of torch.distributed.pipelining


WITH_ALL_ACTIONS = [
    "0UNSHARD,0F0,0SEND_F0,,0F1,0SEND_F1,0RECV_B0,(0F2;0I0)OVERLAP_F_B,0SEND_F2,0W0,0RECV_B1,0B1,0RECV_B2,0I2,0W2,"
    "0REDUCE_GRAD,0RESHARD",
    "1UNSHARD,1RECV_F0,1F0,1RECV_F1,(1F1;1B0)OVERLAP_F_B,1SEND_B0,1I1,1SEND_B1,1RECV_F2,(1F2;1W1)OVERLAP_F_B,1I2,"
    "1SEND_B2,1W2,1REDUCE_GRAD,1RESHARD",
]


@pytest.mark.parametrize("options", MODES, ids=str)
def test_overlapped_pairs_and_all_actions_of_a_csv(options, tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("\n".join(WITH_ALL_ACTIONS))
    model, x, y, loss_fn = case(chain)
    assert not check(model, x, y, path, loss_fn, 2, 3, **options)
