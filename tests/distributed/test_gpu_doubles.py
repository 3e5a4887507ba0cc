"""Pipelines whose ranks are processes with a GPU each, played on the CPU: gradients, messages, failures."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from device_log import WITHIN_A_STEP, Order
from gpu_processes import install
from models import chain
from processes import Gone, die, outcomes, run
from random_runs import Dawdling
from reference import gradients, reference_step, twin
from replicas import average
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import pipeline_ext as pe
from pipeline_ext import _C

NAMES = [name for name in _C.schedule_names() if name != "dualpipe"]  # which has a second copy of the stages


def pipeline(model, stages, microbatches, **options):
    options = {"loss_fn": F.mse_loss, "timeout": 20, **options}
    return pe.Pipeline(model, stages, microbatches, mesh=dist.group.WORLD, devices=["cuda:0"], **options)


def batch(rows, seed=0, width=12):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, width, generator=generator) for _ in range(2)]


def check_step(pipe, model, plain, x, y):
    """One step, as that of a plain twin."""
    mine = {p for module in pipe.stage_modules for p in module.parameters()}
    expected = reference_step(plain, x, y, pipe.microbatches, F.mse_loss)
    assert torch.equal(pipe.step(x, target=y), expected)
    grads = gradients(plain)
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, grads[name]) if p in mine else p.grad is None, name


def every_schedule(library, carrier, names):
    gpu = install(library, carrier)
    ranks = dist.get_world_size()
    for name in names:
        stages, microbatches = (ranks if _C.layout_of(name) == "linear" else 2 * ranks), 2 * ranks
        for pack in (1, 2, microbatches):
            model = chain(8)
            plain = twin(model)
            with pipeline(model, stages, microbatches, schedule=name, pack=pack) as pipe:
                for step in range(3):
                    gpu.calls.clear()
                    check_step(pipe, model, plain, *batch(11 + step // 2, step))
                sent = {(m.boundary, m.direction): m.count for m in pipe.trace.messages}
                for (_, direction), count in sent.items():
                    k = pack if direction == "backward" else 1
                    assert count == -(-microbatches // k)
                assert sum(call.call == "send" for call in gpu.calls) == sum(sent.values())
                by_way = {(call.way, call.call, call.stream) for call in gpu.calls}
                assert len(by_way) == len({call.way for call in gpu.calls})  # a stream and a direction each
                assert len({stream for _, _, stream in by_way}) == len(by_way)  # which no other has
                with torch.no_grad():
                    out = pipe.eval(batch(9)[0])
                    assert out is None or torch.allclose(out, plain(batch(9)[0]), atol=1e-6)


@pytest.mark.parametrize("carrier", ["CuPy", "torch"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_schedule_and_k_gives_plain_gradients_with_a_message_for_each_group(
    standin_library, ranks, carrier
):
    names = NAMES if (ranks, carrier) == (2, "CuPy") else ["1f1b", "gpipe", "zbv"]
    run(ranks, every_schedule, standin_library, carrier, names, timeout=240)


class Told:
    """Counts the descriptions of messages that this process tells others."""

    def __init__(self, pipe):
        self.count = 0
        descriptions = pipe._engine._waits.descriptions
        tell = descriptions.tell

        def counted(*args):
            self.count += 1
            tell(*args)

        descriptions.tell = counted

    def since(self):
        count, self.count = self.count, 0
        return count


def kinds(library):
    install(library, "CuPy")
    model = chain(4)
    plain = twin(model)
    with pipeline(model, 2, 4, schedule="1f1b") as pipe:
        told = Told(pipe)
        for rows, is_new in [(8, True), (8, False), (11, True), (8, False), (11, False)]:
            check_step(pipe, model, plain, *batch(rows))
            assert told.since() == (4 if is_new else 0), rows
        for m in (model, plain):
            m[0].requires_grad_(False)  # what one process alone sees is another kind for all
        pipe.step(*batch(8)[:1], target=batch(8)[1])
        assert told.since() == 4


def test_what_messages_hold_is_told_once_for_each_kind_of_step(standin_library):
    run(2, kinds, standin_library)


class Fickle(nn.Module):
    """Returns as many columns as the input's values say."""

    def forward(self, x):
        return x[:, : 6 if x[0, 0] > 0 else 5]


class Padded(nn.Module):
    def forward(self, x):
        return F.pad(x, (0, 6 - x.shape[1]))


def changes_shape(library):
    install(library, "CuPy")
    stages = [nn.Sequential(Fickle()), nn.Sequential(Padded(), nn.Linear(6, 6))]
    x, y = torch.ones(4, 6), torch.ones(4, 6)
    with pipeline(stages, 2, 2) as pipe:
        pipe.step(x, target=y)
        pipe.step(-x, target=y)


def test_a_shape_that_hangs_on_values_is_refused_and_every_process_hears_why(standin_library):
    first, second = outcomes(2, changes_shape, standin_library)
    assert first.kind is pe.StageError
    assert "the activations of microbatch 0 across boundary 0 differ in shape" in first.message
    assert second.kind is pe.PeerError and "process 0 failed: 0F0 raised PipelineError" in second.message


class Fails(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.left = step * 4

    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            raise ValueError("no")
        return x


def raises(library, carrier, step):
    install(library, carrier)
    model = chain(4)
    model[4] = nn.Sequential(model[4], Fails(step))
    with pipeline(model, 2, 4) as pipe:
        for _ in range(5):
            pipe.step(*batch(8)[:1], target=batch(8)[1])


@pytest.mark.parametrize("step", [1, 3], ids=["in its first step", "later"])
def test_a_stage_that_raises_ends_the_step_of_all(standin_library, step):
    first, second = outcomes(2, raises, standin_library, "CuPy", step)
    assert first.kind is pe.PeerError and "process 1 failed: 1F3 raised ValueError: no" in first.message
    assert second.kind is pe.StageError and "the forward of microbatch 3 at stage 1" in second.message


class Dies(Fails):
    def forward(self, x):
        self.left -= 1
        if self.left == 0:
            die()
        return x


def loses_one(library):
    install(library, "CuPy")
    model = chain(4)
    model[4] = nn.Sequential(model[4], Dies(3))
    with pipeline(model, 2, 4) as pipe:
        for _ in range(5):
            pipe.step(*batch(8)[:1], target=batch(8)[1])


def test_a_process_that_is_killed_is_named_as_the_next_step_begins(standin_library):
    first, second = outcomes(2, loses_one, standin_library)
    assert isinstance(second, Gone)
    assert first.kind is pe.PeerError and "process 1 does not answer" in first.message


def graphs(library, options):
    gpu = install(library, "CuPy")
    model = chain(4)
    plain = twin(model)
    with pipeline(model, 2, 4, graphs=True, **options) as pipe:
        for number, rows in enumerate([8, 8, 8, 8, 11, 11, 11, 8]):
            x, y = batch(rows, number)
            for m in (model, plain):
                m.zero_grad()
            losses = []
            expected = reference_step(plain, x, y, 4, F.mse_loss)
            assert torch.equal(pipe.step(x, target=y, losses=losses), expected)
            grads = gradients(plain)
            assert all(torch.equal(p.grad, grads[name]) for name, p in pipe.named_parameters())
            assert len(losses) == 4 * (dist.get_rank() == 1)
        return gpu.double.launches, pipe.graph.captured, pipe.graph.fallback


def test_sends_and_receives_are_in_the_steps_graph(standin_library):
    assert run(2, graphs, standin_library, {}) == [(4, 2, None)] * 2


def test_packed_messages_leave_steps_without_a_graph(standin_library):
    for launches, captured, fallback in run(2, graphs, standin_library, {"pack": 2}):
        assert (launches, captured) == (0, 0) and "messages between processes are packed" in fallback


class Item(nn.Module):
    """Cannot be captured."""

    def __init__(self, double):
        super().__init__()
        self.double = double

    def forward(self, x):
        if self.double.capturing:
            raise RuntimeError("operation not permitted when stream is capturing")
        return x


def one_cannot_capture(library):
    gpu = install(library, "CuPy")
    model = chain(4)
    plain = twin(model)
    model[4] = nn.Sequential(model[4], Item(gpu.double))
    x, y = batch(8)
    with pipeline(model, 2, 4, graphs=True) as pipe:
        for _ in range(5):
            for m in (model, plain):
                m.zero_grad()
            assert torch.equal(pipe.step(x, target=y), reference_step(plain, x, y, 4, F.mse_loss))
        return pipe.graph.fallback


def test_where_one_process_cannot_capture_all_run_without_a_graph(standin_library):
    first, second = run(2, one_cannot_capture, standin_library)
    assert first == "it cannot be captured in another process"
    assert "RuntimeError: operation not permitted when stream is capturing" in second


def nothing_stops_the_host(library):
    gpu = install(library, "CuPy")
    kept = []
    with pipeline(chain(8), 4, 8, schedule="interleaved-1f1b", overlap=True, pack=2) as pipe:
        for _ in range(2):
            gpu.standin.reset(1)
            pipe.step(*batch(16)[:1], target=batch(16)[1])
        log = gpu.standin.log()
        looks = [i for i, entry in enumerate(log) if entry.name == "cuEventQuery"]
        order = Order(log[looks[-1] + 2 :])  # after the thread's capture mode is its own again
        layout, plan = pipe._routes.train.layout, pipe.plan
        streams = layout.streams
        assert order.calls <= WITHIN_A_STEP
        assert order.at_end == frozenset(range(len(streams.ops)))
        for task in range(len(plan)):
            for after in plan.successors(task):
                if plan.describe(after)[3] == dist.get_rank():
                    crosses = plan.describe(task)[3] != dist.get_rank()
                    before = streams.sent_by(task) if crosses else streams.op_of(task)
                    assert before in order.before[streams.op_of(after)]
        ran = [task.task for task in pipe.trace.tasks]
        assert sorted(ran) == [t for t in range(len(plan)) if plan.describe(t)[3] == dist.get_rank()]
        keepalive = pipe._routes.train.keepalive
        keep = keepalive.keep

        def noted(value, made, used):
            kept.append(streams.first_after(used.op, made.stream) < len(streams.ops))
            keep(value, made, used)

        keepalive.keep = noted
        pipe.step(*batch(16)[:1], target=batch(16)[1])
        assert sum(kept) > len(kept) / 3  # memory is used again within the step


def test_waits_cover_what_a_process_needs_and_nothing_stops_the_host(standin_library):
    run(2, nothing_stops_the_host, standin_library)


def ties_and_norms(library):
    install(library, "torch")
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Linear(6, 6))
    model[3].weight = model[0].weight
    plain = twin(model)
    x, y = batch(8, width=6)
    with pipeline(model, 2, 4) as pipe:
        for _ in range(2):
            for m in (model, plain):
                m.zero_grad()
            pipe.step(x, target=y)
            reference_step(plain, x, y, 4, F.mse_loss)
            total = pipe.clip_grad_norm_(0.01)
            assert torch.allclose(total, nn.utils.clip_grad_norm_(plain.parameters(), 0.01))
            for name, p in pipe.named_parameters():
                assert torch.allclose(p.grad, plain.get_parameter(name).grad, atol=1e-7)


def test_tied_parameters_are_summed_and_norms_are_of_all_stages(standin_library):
    run(2, ties_and_norms, standin_library)


class InPart(nn.Module):
    """Its replicas use one parameter or the other, and none uses the third."""

    def __init__(self, number):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(3))
        self.number = number

    def forward(self, x):
        return self.layers[self.number](x)


def replicas(library, carrier, pp, options):
    install(library, carrier)
    mesh = init_device_mesh("cpu", (2, pp), mesh_dim_names=("dp", "pp"))
    number = mesh["dp"].get_local_rank()
    model = chain(4)
    model[7] = InPart(number)
    plains = [twin(model), twin(model)]
    plains[1 - number][7].number = 1 - number
    losses = []
    with pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh, devices=["cuda:0"], **options) as pipe:
        here = {p for module in pipe.stage_modules for p in module.parameters()}
        for step in range(4):  # no step but the third has gradients before
            pairs = [batch(11 if step == 1 else 8, 2 * step + replica) for replica in range(2)]
            for m in (model, *plains) if step != 3 else ():
                m.zero_grad()
            with pipe.no_sync() if step == 2 else contextlib.nullcontext():
                losses.append(pipe.step(pairs[number][0], target=pairs[number][1]).item())
            for plain, (x, y) in zip(plains, pairs):
                reference_step(plain, x, y, 4, F.mse_loss)
            if step != 2:
                average(plains)
            grads = gradients(plains[number])
            for name, p in model.named_parameters():
                expected = grads[name] if p in here else None
                same = p.grad is None if expected is None else torch.equal(p.grad, expected)
                assert same, (step, name)
        assert "graphs" not in options or "the replicas of a mesh" in pipe.graph.fallback
    return losses


@pytest.mark.parametrize("carrier", ["CuPy", "torch"])
@pytest.mark.parametrize("pp, options", [(1, {}), (2, {"schedule": "zb-h1"}), (2, {"graphs": True})])
def test_replicas_have_the_mean_of_their_gradients_bit_for_bit(standin_library, carrier, pp, options):
    losses = run(2 * pp, replicas, standin_library, carrier, pp, options)
    assert losses[:pp] == [losses[0]] * pp and losses[pp:] == [losses[pp]] * pp
    assert losses[0] != losses[pp]


def one_replica_fails(library, pp):
    install(library, "CuPy")
    mesh = init_device_mesh("cpu", (2, pp), mesh_dim_names=("dp", "pp"))
    model = chain(4)
    model[7] = nn.Sequential(model[7], Fails(2 if dist.get_rank() == 2 * pp - 1 else 100))
    with pe.Pipeline(model, pp, 4, loss_fn=F.mse_loss, mesh=mesh, devices=["cuda:0"], timeout=20) as pipe:
        try:
            for _ in range(3):
                pipe.step(*batch(8)[:1], target=batch(8)[1])
        except pe.PipelineError as error:
            assert all(p.grad is None for p in pipe.parameters())
            return type(error), str(error)


@pytest.mark.parametrize("pp", [1, 2])
def test_a_stage_that_raises_ends_the_step_of_all_replicas(standin_library, pp):
    *others, (kind, said) = run(2 * pp, one_replica_fails, standin_library, pp)
    assert kind is pe.StageError and "raised ValueError: no" in said
    for kind, said in others:
        assert kind in (pe.PeerError, pe.ReductionError), said
        assert "raised ValueError: no" in said


def refused(library):
    install(library, "CuPy")
    said = []

    def refuse(stages=2, **options):
        try:
            pe.Pipeline(chain(4), stages, 2, loss_fn=F.mse_loss, **options)
        except pe.PipelineError as error:
            said.append(str(error))

    refuse(mesh=dist.group.WORLD, devices=["cuda:0", "cuda:1"])
    refuse(mesh=dist.group.WORLD, devices=["cuda:3"])
    refuse(mesh=dist.group.WORLD, devices=["cuda:0"] if dist.get_rank() else ["cpu"])
    return said


def test_what_processes_with_gpus_do_not_do_is_refused_with_advice(standin_library):
    for said in run(2, refused, standin_library):
        many, absent, differ = said
        assert "give a list with this process's device alone" in many
        assert "devices holds 'cuda:3', and torch sees 1 of them" in absent
        assert "devices is cuda, where CuPy carries messages in process 1 and cpu in process 0" in differ


def skips_refused(library):
    install(library, "CuPy")
    model = nn.Sequential(Dawdling(None, ["early"], []), Dawdling(None, [], ["early"]))
    with pytest.raises(pe.InvalidArgument, match="only neighbors have connections of NCCL; pass the skipped"):
        pe.Pipeline(model, 2, 2, loss_fn=F.mse_loss, mesh=dist.group.WORLD, devices=["cuda:0"])


def test_skips_between_the_gpus_of_processes_are_refused(standin_library):
    run(2, skips_refused, standin_library)
