"""No memory is handed out again on one stream of a GPU while another still uses it.

torch's caching allocator gives a freed block to the next allocation on its stream at once. Here the tasks of a
step run on the CPU in the order in which they would be enqueued. A dispatch mode notes for each storage the
task that allocated it, those that used it, and when it was freed; the plan's waits say what comes after what.
"""

import functools
from collections import defaultdict
from dataclasses import dataclass, field

import models
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import pipeline_ext as pe
from pipeline_ext.engines.cuda import keepalive, torch_side
from pipeline_ext.engines.cuda.device_copy import DeviceCopy
from pipeline_ext.engines.cuda.keepalive import KeepAlive
from pipeline_ext.engines.cuda.layout import StreamLayout
from pipeline_ext.engines.cuda.parameters import LaneParameters
from pipeline_ext.microbatches.cutting import Cutter, Whole
from pipeline_ext.model.skips import declared_skips, find_skips
from pipeline_ext.stages.context import CallerContext
from pipeline_ext.stages.shared_parameters import SharedParameters
from pipeline_ext.stages.stage import Stage
from pipeline_ext.stages.step import Step
from pipeline_ext.transport.exchange import Exchange

WIDTH = 12
BODIES = {"F": "forward", "B": "backward", "I": "input_gradient", "W": "weight_gradient"}


@dataclass(eq=False)
class Lifetime:
    """Of a storage, in numbers of ops."""

    storage: StorageWeakRef
    made: int
    by: str
    uses: set[int] = field(default_factory=set)
    freed: int | None = None


class Watch(TorchDispatchMode):
    """Notes the lifetimes of all storages that are made inside it."""

    def __init__(self):
        super().__init__()
        self.op = 0
        self.all, self._living = [], {}

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        aliases = [r.alias_info for r in operator._schema.returns if r.alias_info is not None]
        makes_view = any(not alias.is_write for alias in aliases)  # which uses nothing
        if not makes_view:
            self.use((args, kwargs))
            self.use(out, by=str(operator))
        return out

    def use(self, values, by=None):
        for tensor in tree_leaves(values):
            if not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
                continue
            storage = tensor.untyped_storage()
            known = self._living.get(storage._cdata)
            if known is None or known.storage.expired():
                if by is None:
                    continue
                known = Lifetime(StorageWeakRef(storage), self.op, by)
                self._living[storage._cdata] = known
                self.all.append(known)
            known.uses.add(self.op)

    def look(self):
        for key, lifetime in list(self._living.items()):
            if lifetime.storage.expired():
                lifetime.freed = self.op
                del self._living[key]


def unsafe(stages, loss_fn, x, target, plan, monkeypatch):
    """What is handed out too early in a step, in words."""
    watch = Watch()

    class Watched(DeviceCopy):
        def packed(self, results, buffer):
            watch.use((list(results.values()), buffer))
            super().packed(results, buffer)

    monkeypatch.setattr(torch_side, "current_stream", lambda device: None)
    monkeypatch.setattr(torch_side, "empty", lambda nbytes, device: torch.empty(nbytes, dtype=torch.uint8))
    layout = StreamLayout(plan, [0] * plan.num_ranks)
    kept = KeepAlive(layout)
    devices = [torch.device("cpu")] * plan.num_stages
    skips = skips_of(stages)
    exchange = Exchange(
        plan,
        stream_memory_of=functools.partial(Watched, layout, kept, None, devices),
        skips=[skip.name for skip in skips],
    )
    last = plan.num_stages - 1
    made = [
        Stage(i, module, is_last=i == last, loss_fn=loss_fn if i == last else None, skips=skips)
        for i, module in enumerate(stages)
    ]
    shared = SharedParameters({stage.index: stage.modules() for stage in made})
    parameters = LaneParameters(made, shared.target, devices)
    cutter = Cutter()
    cut = cutter.cut_inputs(Whole((x,), {}), plan.num_microbatches)
    step = Step(
        exchange=exchange,
        microbatches=plan.num_microbatches,
        rows=cut.lengths,
        context=CallerContext.of_this_thread(),
        inputs=cut.parts,
        targets=cutter.cut_target(target, sum(cut.lengths), plan.num_microbatches),
        weighted=True,
    )
    shared.begin()
    parameters.begin()
    exchange.begin(step)
    for stage in made:
        stage.begin(step)
    ops = layout.streams.ops
    with watch, torch.autograd.set_multithreading_enabled(False):
        for op, ((kind, index, m), lane, _) in enumerate(ops):
            watch.op = op
            kept.release(op)
            watch.look()
            parameters.enter(index, lane)
            if kind in "BW":
                parameters.before_backward(index, lane)
            getattr(made[index], BODIES[kind])(m)
            parameters.leave(index)
            if kind in "BW":
                parameters.after_backward(index, lane)
            watch.look()
    return list(faults(watch.all, ops, layout.streams.first_after))


def faults(lifetimes, ops, first_after):
    on_stream = defaultdict(list)
    for op, (_, stream, _) in enumerate(ops):
        on_stream[stream].append(op)
    for of in lifetimes:
        home = ops[of.made][1]
        others = [op for op in of.uses if ops[op][1] != home]
        unordered = [op for op in others if first_after(of.made, ops[op][1]) > op]
        if unordered:
            before = [ops[op][0] for op in unordered]
            yield f"made by {of.by} in {ops[of.made][0]}, used before that in {before}"
        if of.freed is None:
            continue
        reused = next((op for op in on_stream[home] if op >= of.freed), len(ops))
        late = [op for op in others if first_after(op, home) > reused]
        if late:
            yield (
                f"made by {of.by} in {ops[of.made][0]}, freed in {ops[of.freed][0]}, still used by "
                f"{[ops[op][0] for op in late]}"
            )


@pe.skips(stash=lambda level: level.stashes, pop=lambda level: level.pops)
class Level(nn.Module):
    """Hands on what it stashes: its result, or its input, which an earlier stage has allocated."""

    def __init__(self, stashes=(), pops=(), early=False):
        super().__init__()
        self.linear, self.stashes, self.pops, self.early = nn.Linear(WIDTH, WIDTH), stashes, pops, early

    def forward(self, x):
        y = torch.tanh(self.linear(x + sum(pe.pop(name).sin() for name in self.pops)))
        for name in self.stashes:
            pe.stash(name, x if self.early else y)
        return x if self.early else y


def levels(stages):
    between = [Level() for _ in range(stages - 3)]
    return [Level(["far", "near"]), Level(["passed"], ["near"], True), *between, Level([], ["passed", "far"])]


class Through(nn.Module):
    """Hands on its input beside a result, a part of it, and the input of the stage before."""

    def __init__(self, place, stages):
        super().__init__()
        self.linear, self.place, self.stages = nn.Linear(WIDTH, WIDTH), place, stages

    def forward(self, state):
        kept = () if self.place == 0 else state[1:]
        x = state if self.place == 0 else state[0]
        y = torch.tanh(self.linear(x))
        if self.place + 1 < self.stages:
            return y, x, *(value[:, : WIDTH - self.place] for value in kept)
        return y + sum(value.sum(1, keepdim=True) for value in kept)


def sliced(stages):
    layers = models.chain(2 * stages, WIDTH)
    size = len(layers) // stages
    return [layers[i * size : (i + 1) * size] for i in range(stages)]


def tied(stages):
    layers = [nn.Linear(WIDTH, WIDTH) for _ in range(stages)]
    layers[-1].weight = layers[0].weight
    return layers


def of_class(kind, *args):
    return lambda stages: [kind(*args) for _ in range(stages)]


MODELS = {
    "chain": sliced,
    "tree": lambda stages: list(models.tree(stages)),
    "encoder and decoders": lambda stages: models.encoder_and_decoders(stages, WIDTH),
    "handed through": lambda stages: [Through(i, stages) for i in range(stages)],
    "residual": of_class(models.Residual, WIDTH),
    "constant": of_class(models.Constant),
    "slices": of_class(models.Slices),
    "at once": of_class(models.AtOnce),
    "recomputed": of_class(models.Recomputed, False),
    "images": of_class(models.Images),
    "tied": tied,
    "skips": levels,
}
SHAPES = [  # schedule, ranks, stages, microbatches, overlap, K
    ("1f1b", 4, 4, 8, False, 1),
    ("1f1b", 6, 6, 12, True, 1),
    ("1f1b", 4, 4, 8, True, 2),
    ("gpipe", 4, 4, 16, False, 1),
    ("interleaved-1f1b", 2, 4, 8, True, 1),
    ("zb-h1", 4, 4, 8, False, 1),
    ("zb-h1", 4, 4, 8, True, 1),
    ("zb-h2", 4, 4, 8, True, 1),
    ("zb-h2", 4, 4, 8, False, 2),
    ("zbv", 2, 4, 8, False, 1),
    ("v-half", 2, 4, 8, True, 1),
    ("dualpipev", 2, 4, 8, True, 1),
]


def skips_of(stages):
    return find_skips(declared_skips(dict(enumerate(stages))))


def planned(shape, skips=()):
    schedule, ranks, stages, microbatches, overlap, pack = shape
    packs = {} if pack == 1 else {"packs": [pack] * (stages - 1), "packs_forward": [pack] * (stages - 1)}
    return pe.build_plan(
        schedule,
        num_stages=stages,
        num_ranks=ranks,
        microbatches=microbatches,
        overlap=overlap,
        reactive=True,
        skips=[pe.Skip(s.source, s.target, pack=pack, pack_forward=pack) for s in skips],
        **packs,
    )


def batch_of(name, rows):
    if name == "tree":
        return (*models.tree_batch(rows), models.tree_loss)
    loss_fn = F.mse_loss if name != "constant" else lambda out, target: F.mse_loss(out[0] * out[1], target)
    return torch.randn(rows, WIDTH), torch.randn(rows, WIDTH), loss_fn


@pytest.mark.filterwarnings("ignore:input:UserWarning")
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "-".join(map(str, shape)))
@pytest.mark.parametrize("name", MODELS)
def test_nothing_is_handed_out_while_another_stream_uses_it(name, shape, monkeypatch):
    stages = MODELS[name](shape[2])
    plan = planned(shape, skips_of(stages))
    x, target, loss_fn = batch_of(name, 2 * plan.num_microbatches)
    assert not unsafe(stages, loss_fn, x, target, plan, monkeypatch)


@pytest.mark.filterwarnings("ignore:input:UserWarning")
@pytest.mark.parametrize("name", ["tree", "encoder and decoders"])
def test_the_check_sees_what_is_kept_for_a_stage_that_only_handed_it_on(name, monkeypatch):
    monkeypatch.setattr(keepalive, "_storages", lambda value: ())
    plan = planned(("zb-h1", 4, 4, 8, False, 1))
    x, target, loss_fn = batch_of(name, 16)
    found = unsafe(MODELS[name](4), loss_fn, x, target, plan, monkeypatch)
    assert any("still used by" in fault for fault in found)


def test_the_check_sees_what_is_not_kept(monkeypatch):
    monkeypatch.setattr(KeepAlive, "keep", lambda *_: None)
    plan = planned(("1f1b", 4, 4, 8, True, 1))
    x, target, loss_fn = batch_of("chain", 16)
    assert unsafe(MODELS["chain"](4), loss_fn, x, target, plan, monkeypatch)


@pytest.mark.parametrize(
    "make, parts",
    [
        (lambda t: t, 1),
        (lambda t: t.to_sparse(), 2),
        (lambda t: t.to_sparse_csr(), 3),
        (lambda t: t.to_sparse_csc(), 3),
        (lambda t: torch.nested.nested_tensor([t, t[:2]], layout=torch.jagged), 4),
        (lambda t: {"a": [t, t.clone()], "b": 1}, 2),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_memory_of_every_kind_of_tensor_is_known(make, parts):
    value = make(torch.eye(4))
    assert len(set(keepalive._storages(value))) == parts
