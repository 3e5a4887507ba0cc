"""Exported orders load in torch.distributed.pipelining's schedule runtime, which adds messages, and run."""

import pytest
import torch
from torch import nn
from torch_runtime import Runtime, batch_of, stage_of

import pipeline_ext as pe
from pipeline_ext import _C

pytest.importorskip("torch.distributed.pipelining.schedules")


@pytest.fixture(scope="module")
def runtime(tmp_path_factory):
    with Runtime(2, tmp_path_factory.mktemp("runtime")) as runtime:
        yield runtime


def reference(stages, microbatches):
    model = nn.Sequential(*(stage_of(s) for s in range(stages)))
    for x, y in zip(*(t.tensor_split(microbatches) for t in batch_of(microbatches))):
        (nn.functional.mse_loss(model(x), y) / microbatches).backward()
    return [[p.grad for p in stage.parameters()] for stage in model]


# A stage that lives on two ranks, as in dualpipe, is nothing that the runtime knows.
@pytest.mark.parametrize("name", [n for n in pe.schedule_names() if n != "dualpipe"])
@pytest.mark.parametrize("microbatches", [4, 7])
def test_an_exported_order_gives_the_gradients_in_torch_s_runtime(runtime, name, microbatches):
    if torch.__version__ < "2.12" and name in _C.schedule_names() and _C.layout_of(name) == "v":
        pytest.skip("torch 2.11 sends from a process to itself here, which gloo cannot")
    looped = name in _C.schedule_names() and _C.layout_of(name) in ("looped", "v")
    stages = 4 if looped else 2
    plan = pe.build_plan(name, num_stages=stages, num_ranks=2, microbatches=microbatches)
    found = runtime.gradients(plan.to_csv(), plan.rank_of_stage, microbatches)
    torch.testing.assert_close(found, reference(stages, microbatches))


def test_what_a_simulation_changed_runs_there_too(runtime):
    # The order in which ranks that react began, where the second stage is slow.
    plan = pe.build_plan("interleaved-1f1b", num_stages=4, num_ranks=2, microbatches=6, reactive=True)
    began = pe.simulate(plan, pe.Costs(forward=[1, 3, 1, 1], backward=[2, 6, 2, 2])).order()
    assert began != plan.order()
    csv = "\n".join(",".join(began[rank]) for rank in range(2))
    torch.testing.assert_close(runtime.gradients(csv, plan.rank_of_stage, 6), reference(4, 6))
