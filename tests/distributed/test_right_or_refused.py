"""What holds in one process holds in two: what is a row, what is drawn, what counts, what a loss may reach."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from reference import gradients, twin
from test_random_streams import STAGES, dropouts
from torch import nn

import pipeline_ext as pe


def local_gradients(pipe, model):
    """Copies of the gradients of this process's stages, by name."""
    here = {p for module in pipe.stage_modules for p in module.parameters()}
    return {name: p.grad.clone() for name, p in model.named_parameters() if p in here and p.grad is not None}


def close(found, wanted):
    assert found
    for name, grad in found.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-5, atol=1e-6)


# -- rows


class Masked(nn.Linear):
    def forward(self, x, mask=None):
        return super().forward(x * mask if mask is not None else x)


def step_by_row():
    torch.manual_seed(0)
    stages = nn.ModuleList([Masked(4, 4), nn.Linear(4, 2)])
    plain = twin(stages)
    x, y, mask = torch.randn(4, 3, 4), torch.randn(4, 3, 2), torch.rand(3, 4)
    F.mse_loss(plain[1](plain[0](x, mask)), y).backward()
    with pe.Pipeline(list(stages), microbatches=2, loss_fn=F.mse_loss, mesh=dist.group.WORLD) as pipe:
        pipe.step(x, mask=pe.whole(mask), target=y)
        close(local_gradients(pipe, stages), gradients(plain))
        out = pipe.eval(x, mask=pe.whole(mask))
        if out is not None:
            torch.testing.assert_close(out, plain[1](plain[0](x, mask)))

    stages.zero_grad()
    plain.zero_grad()
    parts, targets = [torch.randn(n, 4) for n in (1, 5)], [torch.randn(n, 2) for n in (1, 5)]
    F.mse_loss(plain[1](plain[0](torch.cat(parts))), torch.cat(targets)).backward()
    with pe.Pipeline(list(stages), microbatches=2, loss_fn=F.mse_loss, mesh=dist.group.WORLD) as pipe:
        first, last = dist.get_rank() == 0, dist.get_rank() == 1
        pipe.step(arg_mbs=iter(parts) if first else None, target_mbs=targets if last else None)
        close(local_gradients(pipe, stages), gradients(plain))
        out = pipe.eval(arg_mbs=parts) if first else pipe.eval()
        assert first or torch.allclose(out, plain[1](plain[0](torch.cat(parts))))

    stages.zero_grad()
    plain.zero_grad()
    x, y = torch.randn(5, 4, 4), torch.randn(5, 4, 2)
    F.mse_loss(plain[1](plain[0](x)), y).backward()
    with pe.Pipeline(
        list(stages), microbatches=2, loss_fn=F.mse_loss, batch_dim=1, mesh=dist.group.WORLD
    ) as pipe:
        pipe.step(x, target=y)
        close(local_gradients(pipe, stages), gradients(plain))


class Averaged(nn.Linear):
    def forward(self, x, weights):
        return super().forward(x * weights.mean())


def step_in_doubt():
    """A mask [4, 4] of a batch of four samples; the first stage is all that can be tried."""
    torch.manual_seed(0)
    stages = nn.ModuleList([Masked(4, 4), nn.Linear(4, 2)])
    plain = twin(stages)
    x, y, mask = torch.randn(4, 4, 4), torch.randn(4, 4, 2), torch.rand(4, 4)
    F.mse_loss(plain[1](plain[0](x, mask)), y).backward()
    with pe.Pipeline(list(stages), microbatches=4, loss_fn=F.mse_loss, mesh=dist.group.WORLD) as pipe:
        if dist.get_rank() == 0:
            with pytest.raises(pe.InvalidArgument, match=r"\['mask'\], of shape \[4, 4\], has as many rows"):
                pipe.step(x, mask=mask)
            pipe.step(x, mask=pe.whole(mask))
        else:
            pipe.step(target=y)
        close(local_gradients(pipe, stages), gradients(plain))
    undecided = [Averaged(4, 4), nn.Linear(4, 2)]
    with pe.Pipeline(undecided, microbatches=4, loss_fn=F.mse_loss, mesh=dist.group.WORLD) as pipe:
        if dist.get_rank() == 0:
            with pytest.warns(UserWarning, match=r"\['weights'\], of shape \[4\], is cut"):
                pipe.step(x, weights=torch.rand(4))
        else:
            pipe.step(target=y)


def test_a_doubt_is_settled_by_the_first_stage_or_said():
    run(2, step_in_doubt)


def test_rows_are_said_as_in_one_process():
    run(2, step_by_row)


# -- what counts


def masked(out, target):
    return F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=-100)


def step_with_counts(replicas):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11))
    plain = twin(model)
    rows = 8 * replicas
    ids, target = torch.randint(11, (rows, 5)), torch.randint(11, (rows, 5))
    target[:2] = -100
    target[2:3, 2:] = -100
    expected = masked(plain(ids), target)
    expected.backward()
    if replicas == 1:
        mesh, part = dist.group.WORLD, slice(None)
    else:
        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
        part = slice(8 * mesh.get_local_rank("dp"), 8 * mesh.get_local_rank("dp") + 8)
    with pe.Pipeline(model, 2, 4, loss_fn=masked, loss_weight=pe.count_not(-100), mesh=mesh) as pipe:
        loss = pipe.step(ids[part], target=target[part])
        close(local_gradients(pipe, model), gradients(plain))
        if replicas == 1:
            torch.testing.assert_close(loss, expected.detach())
    with pe.Pipeline(model, 2, 4, loss_fn=masked, mesh=mesh, timeout=10) as pipe:
        told = r"count_not\(-100\)" if dist.get_rank() == 1 else None  # to the process that has such labels
        with pytest.raises(pe.PipelineError, match=told):
            pipe.step(ids[part], target=target[part])


@pytest.mark.parametrize("replicas", [1, 2])
def test_a_mean_over_what_counts(replicas):
    run(2 * replicas, step_with_counts, replicas)


# -- what is drawn


TRAINS = (True, False, True)  # a step in evaluation mode draws nothing here; evaluations between steps draw


def drawing_model(kind):
    if kind != "the last stage":
        return dropouts(False if kind == "recomputed" else None)
    model = dropouts()
    for layer in model[:-1]:
        layer[1].p = 0.0
    return model


def draw(schedule, kind):
    torch.manual_seed(0)
    model, x, y = drawing_model(kind), torch.randn(8, 8), torch.randn(8, 8)
    torch.manual_seed(7)
    found = []
    with pe.Pipeline(
        model, STAGES if schedule == "interleaved-1f1b" else 2, 4, schedule, F.mse_loss, mesh=dist.group.WORLD
    ) as pipe:
        for trains in TRAINS:
            model.train(trains)
            model.zero_grad()
            loss = pipe.step(x, target=y)
            found.append((loss, local_gradients(pipe, model)))
            pipe.eval(x if dist.get_rank() == 0 else None, keep_mode=True)
    return found, torch.rand(1)


@pytest.mark.parametrize("kind", ["all stages", "recomputed", "the last stage"])
@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1", "interleaved-1f1b"])
def test_two_processes_draw_what_one_draws(schedule, kind):
    torch.manual_seed(0)
    model, x, y = drawing_model(kind), torch.randn(8, 8), torch.randn(8, 8)
    torch.manual_seed(7)
    alone = []
    options = {"schedule": schedule, "devices": ["cpu"] * 2}
    with pe.Pipeline(
        model, STAGES if schedule == "interleaved-1f1b" else 2, 4, loss_fn=F.mse_loss, **options
    ) as pipe:
        for trains in TRAINS:
            model.train(trains)
            model.zero_grad()
            alone.append((pipe.step(x, target=y), gradients(model)))
            pipe.eval(x, keep_mode=True)
    after = torch.rand(1)
    for found, after_here in run(2, draw, schedule, kind):
        assert torch.equal(after_here, after)
        for (loss, grads), (expected, wanted) in zip(found, alone):
            assert torch.equal(loss, expected)
            assert grads and all(torch.equal(grad, wanted[name]) for name, grad in grads.items())


# -- what a loss may reach


def penalty(parameters):
    return 1e-2 * sum(p.square().sum() for p in parameters)


def reach():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    plain = twin(model)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    (F.mse_loss(plain(x), y) + penalty(plain.parameters())).backward()
    with pe.Pipeline(
        model,
        2,
        4,
        loss_fn=lambda o, t: F.mse_loss(o, t) + penalty(model.parameters()),
        mesh=dist.group.WORLD,
        timeout=10,
    ) as pipe:
        with pytest.raises(pe.PipelineError, match=r"0\.(weight|bias), a parameter of stage 0.*stage_loss="):
            pipe.step(x, target=y)
    with pe.Pipeline(
        model, 2, 4, loss_fn=F.mse_loss, stage_loss=lambda m: penalty(m.parameters()), mesh=dist.group.WORLD
    ) as pipe:
        pipe.step(x, target=y)
        close(local_gradients(pipe, model), gradients(plain))
        with pytest.raises(pe.InvalidArgument, match="verify runs the unsplit model too"):
            pipe.verify(x, target=y)


def test_a_penalty_on_weights_of_another_process_is_refused_and_right_as_stage_loss():
    run(2, reach)


class Expert(nn.Linear):
    """Keeps its balancing loss in an attribute, which is a constant until it has run."""

    def __init__(self):
        super().__init__(8, 8)
        self.aux_loss = torch.zeros(())

    def forward(self, x):
        out = super().forward(x)
        self.aux_loss = out.softmax(-1).mean(0).square().sum()
        return x + out


def of_experts(module):
    return sum((m.aux_loss for m in module.modules() if isinstance(m, Expert)), torch.zeros(()))


def collect():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), Expert(), Expert(), nn.Linear(8, 2))
    plain = twin(model)
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    for a, b in zip(x.chunk(4), y.chunk(4)):
        ((F.mse_loss(plain(a), b) + of_experts(plain)) / 4).backward()
    with pe.Pipeline(
        model,
        2,
        4,
        loss_fn=lambda o, t: F.mse_loss(o, t) + of_experts(model),
        mesh=dist.group.WORLD,
        timeout=10,
    ) as pipe:
        told = r"reads aux_loss of a Expert in a stage of another.*stage_loss="
        with pytest.raises(pe.PipelineError, match=told):
            pipe.step(x, target=y)
    assert all(type(m).__module__ != "pipeline_ext.stages.elsewhere" for m in model.modules())
    with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, stage_loss=of_experts, mesh=dist.group.WORLD) as pipe:
        pipe.step(x, target=y)
        close(local_gradients(pipe, model), gradients(plain))


def test_what_a_stage_of_another_process_keeps_is_refused_and_right_as_stage_loss():
    run(2, collect)
