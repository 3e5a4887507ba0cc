"""Models that are cut by their own forward, with a process for each stage."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import run
from torch.nn.parallel import DistributedDataParallel

import pipeline_ext as pe

sys.path.append(str(Path(__file__).parents[1]))
from random_calls import Model
from test_calls import Drawing, Experts, Net, OfAnother, Returned, Shared, Tied, WithParameter

KINDS = {
    "Net": Net,
    "Drawing": Drawing,
    "hooks": lambda: Experts("hooks"),
    "attribute": lambda: Experts("attribute"),
    "entry": lambda: Experts("entry"),
    "OfAnother": OfAnother,
    "Shared": Shared,
    "Tied": Tied,
    "WithParameter": WithParameter,
}


def trained(model, inputs, mesh, **options):
    """The loss of a step and the gradients by name, of the stages of this process."""
    with pe.Pipeline(model, 2, 4, "zb-h1", sample=inputs, mesh=mesh, balance="parameters", **options) as pipe:
        torch.manual_seed(3)
        target = options.get("loss_fn") and torch.ones(8, 2)
        loss = pipe.step(**inputs, target=target)
        return float(loss), {n: None if p.grad is None else p.grad.clone() for n, p in pipe.named_parameters()}


def of_kind(name):
    torch.manual_seed(0)
    return KINDS[name](), {"x": torch.randn(8, 4)}


def train_all():
    found = {}
    for name in KINDS:
        model, inputs = of_kind(name)
        found[name] = trained(model, inputs, dist.group.WORLD, loss_fn=F.mse_loss)
    return found


def test_two_processes_give_the_gradients_of_one():
    both = run(2, train_all)
    for name in KINDS:
        model, inputs = of_kind(name)
        loss, expected = trained(model, inputs, None, loss_fn=F.mse_loss)
        names = set()
        for of_process in both:
            found_loss, found = of_process[name]
            assert found_loss == loss, name
            names |= found.keys()
            for parameter, grad in found.items():
                assert (grad is None) == (expected[parameter] is None), (name, parameter)
                if grad is not None:
                    assert torch.allclose(grad, expected[parameter], rtol=1e-5, atol=1e-7), (name, parameter)
        assert names == expected.keys(), name


def train_random():
    """By seed: the loss, or why the model was refused."""
    found = {}
    for seed in range(20):
        torch.manual_seed(seed)
        model, inputs = Model(seed), {"x": torch.randn(8, 6)}
        try:
            found[seed] = trained(model, inputs, dist.group.WORLD if dist.is_initialized() else None)
        except (pe.InvalidArgument, RuntimeError) as error:
            found[seed] = type(error).__name__, {}
    return found


def test_random_models_in_two_processes_are_as_in_one():
    first, second = run(2, train_random)
    expected = train_random()
    assert sum(isinstance(loss, float) for loss, _ in expected.values()) >= 10
    for seed, (loss, grads) in expected.items():
        for of_process in (first, second):
            assert of_process[seed][0] == loss, seed
            for name, grad in of_process[seed][1].items():
                assert (grad is None) == (grads[name] is None), (seed, name)
                assert grad is None or torch.allclose(grad, grads[name], rtol=1e-4, atol=1e-6), (seed, name)


def use_what_is_elsewhere():
    model, (x, y) = Returned(), (torch.randn(8, 4), torch.randn(8, 2))
    inputs = {"x": x, "y": y}
    with pe.Pipeline(model, 2, 4, sample=inputs, mesh=dist.group.WORLD) as pipe:
        pipe.step(**inputs)
        here = {name for name, _ in pipe.named_parameters()}
        assert all(p.is_meta != (name in here) for name, p in model.named_parameters())
        assert sorted(pipe.state_dict()) == sorted(here)
        output = pipe.eval(**inputs)
        with pytest.raises(pe.PipelineError, match="weights of .* are in another process.*call eval"):
            model(x)
        return sorted(here), None if output is None else output["out"]


def test_weights_of_other_processes_cannot_be_used():
    (first, nothing), (second, output) = run(2, use_what_is_elsewhere)
    assert nothing is None and output.shape == (8, 2)
    assert sorted(first + second) == sorted(name for name, _ in Returned().named_parameters())


def wait_for_a_sample():
    with pytest.raises(pe.InvalidArgument, match="give a batch as sample="):
        pe.Pipeline(Net(), 2, 4, loss_fn=F.mse_loss, mesh=dist.group.WORLD)
    return True


def test_many_processes_need_a_sample():
    assert run(2, wait_for_a_sample) == [True, True]


def train_replicas():
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "pp"))
    model, inputs = of_kind("Net")
    batch = {"x": inputs["x"] + mesh["dp"].get_local_rank()}
    return trained(model, batch, mesh, loss_fn=F.mse_loss)[1]


def test_replicas_of_a_pipeline_average_their_gradients():
    model, inputs = of_kind("Net")
    grads = [
        trained(copy.deepcopy(model), {"x": inputs["x"] + replica}, None, loss_fn=F.mse_loss)[1]
        for replica in range(2)
    ]
    for of_process in run(4, train_replicas):
        for name, grad in of_process.items():
            assert torch.allclose(grad, (grads[0][name] + grads[1][name]) / 2, rtol=1e-5, atol=1e-7), name


def wrap():
    model, inputs = of_kind("Net")
    model.blocks[0] = DistributedDataParallel(model.blocks[0])
    with pytest.raises(pe.InvalidArgument, match="DistributedDataParallel inside.*dimension .dp."):
        pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, sample=inputs, mesh=dist.group.WORLD)
    return True


def test_wrapped_layers_are_refused():
    assert run(2, wrap) == [True, True]
