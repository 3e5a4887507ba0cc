"""Processes with a GPU each, forked in a moment: gradients near those of the whole model, and failures."""

import gc
import os
import time

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Residual
from processes import Gone, die, freeze, outcomes, run
from reference import reference_step, twin
from replicas import average
from torch import nn

import pipeline_ext as pe

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and torch sees {GPUS}"),
]

MICROBATCHES = 8
TIMEOUT = 300.0  # seconds, of all cases together
CASES = {
    "1f1b": {},
    "interleaved": {"schedule": "interleaved-1f1b"},
    "zero bubble": {"schedule": "zb-h1"},
    "packed": {"pack": 4, "pack_forward": 2},
    "sent as float64": {"wire": torch.float64, "wire_forward": torch.float64},
    "graphs": {"graphs": True},
    "tied": {},
    "tied in graphs": {"graphs": True},
}


def device():
    return torch.device("cuda", dist.get_rank())


def pipeline(model, stages=None, microbatches=MICROBATCHES, timeout=60, **options):
    return pe.Pipeline(
        model,
        stages,
        microbatches,
        loss_fn=F.mse_loss,
        mesh=dist.group.WORLD,
        devices=[device()],
        timeout=timeout,
        **options,
    )


def residuals(count, ties):
    layers = [Residual(16) for _ in range(count)]
    if ties:
        layers[-1].up.weight = layers[0].up.weight
        layers[-1].norm.bias = layers[1].norm.bias
    return nn.Sequential(*layers)


def check_near(found, expected, where):
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max(), where


def follows_the_whole_model(case):
    ranks = dist.get_world_size()
    stages = 2 * ranks if "interleaved" in case else ranks
    torch.manual_seed(0)
    model = residuals(2 * ranks, "tied" in case)
    plain = twin(model).to(device())
    with pipeline(model, stages, **CASES[case]) as pipe:
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (pipe, plain)]
        for step in range(8):
            rows = 20 if step == 4 else 16  # another shape, between steps of one
            x, y = torch.randn(2, rows, 16)
            for optimizer in optimizers:
                optimizer.zero_grad()
            losses = []
            loss = pipe.step(x, target=y, losses=losses)
            expected = reference_step(plain, x.to(device()), y.to(device()), MICROBATCHES, F.mse_loss)
            assert loss.item() == pytest.approx(expected.item(), rel=1e-4), (case, step)
            assert len(losses) == MICROBATCHES * (dist.get_rank() == pipe.plan.rank_of_stage[-1])
            for name, parameter in pipe.named_parameters():
                check_near(parameter.grad, plain.get_parameter(name).grad, (case, step, name))
            for optimizer in optimizers:
                optimizer.step()
        if case == "graphs":
            assert pipe.graph.fallback is None and pipe.graph.captured >= 1
        elif case == "tied in graphs":
            assert "share parameters" in pipe.graph.fallback or "another process" in pipe.graph.fallback
        with torch.no_grad():
            out = pipe.eval(x)
            assert out is None or torch.allclose(out, plain(x.to(device())), rtol=0, atol=1e-3), case
            assert (out is None) == (dist.get_rank() != pipe.plan.rank_of_stage[-1]), case


def every_case(carrier):
    if carrier == "torch":
        from pipeline_ext.engines.cuda import nccl

        nccl.carrier = lambda: "torch"
    for case in CASES:
        follows_the_whole_model(case)
        # Torch ends a group's communicators where it is collected, and waits for them with Python's lock, which
        # the threads of a software GPU need for Triton's kernels.
        torch.cuda.synchronize(device())
        gc.collect()


@pytest.mark.parametrize("carrier", ["CuPy", "torch"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_gradients_are_those_of_the_whole_model_within_rounding(ranks, carrier):
    if ranks > GPUS:
        pytest.skip(f"needs {ranks} GPUs, and torch sees {GPUS}")
    if carrier == "CuPy":
        pytest.importorskip("cupy")
    run(ranks, every_case, carrier, timeout=TIMEOUT)


def replicas_follow_the_whole_model(carrier, pp, schedule):
    if carrier == "torch":
        from pipeline_ext.engines.cuda import nccl

        nccl.carrier = lambda: "torch"
    mesh = dist.init_device_mesh("cpu", (2, pp), mesh_dim_names=("dp", "pp"))
    number = mesh["dp"].get_local_rank()
    torch.manual_seed(number)  # replicas begin with the first one's parameters
    model = residuals(2 * pp, ties=False)
    torch.manual_seed(0)
    plains = [residuals(2 * pp, ties=False).to(device()) for _ in range(1)]
    plains.append(twin(plains[0]))
    options = {"loss_fn": F.mse_loss, "mesh": mesh, "devices": [device()], "timeout": 60}
    stages = pp if schedule == "1f1b" else 2 * pp
    optimizers = [torch.optim.SGD(plain.parameters(), lr=0.01) for plain in plains]
    with pe.Pipeline(model, stages, MICROBATCHES, schedule, **options) as pipe:
        optimizers.append(torch.optim.SGD(pipe.parameters(), lr=0.01))
        for step in range(4):
            torch.manual_seed(step)
            pairs = torch.randn(2, 2, 16, 16)
            x, y = pairs[number]
            if step == 2:
                with pipe.no_sync():
                    pipe.step(x, target=y)
            else:
                pipe.step(x, target=y)
            batches = [tuple(pair.to(device())) for pair in pairs]
            for plain, (x, y) in zip(plains, batches):
                reference_step(plain, x, y, MICROBATCHES, F.mse_loss)
            if step != 2:
                average(plains)
            for name, parameter in pipe.named_parameters():
                check_near(parameter.grad, plains[number].get_parameter(name).grad, (step, name))
            if step != 2:
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        return {name: parameter.tolist() for name, parameter in pipe.named_parameters()}


@pytest.mark.parametrize("carrier", ["CuPy", "torch"])
@pytest.mark.parametrize("pp, schedule", [(1, "1f1b"), (2, "1f1b"), (2, "zbv")])
def test_gradients_of_replicas_are_their_mean_and_replicas_stay_equal(pp, schedule, carrier):
    if 2 * pp > GPUS:
        pytest.skip(f"needs {2 * pp} GPUs, and torch sees {GPUS}")
    if carrier == "CuPy":
        pytest.importorskip("cupy")
    found = run(2 * pp, replicas_follow_the_whole_model, carrier, pp, schedule, timeout=TIMEOUT)
    assert found[:pp] == found[pp:]  # bit for bit


class Counted(nn.Linear):
    """Does ``fault``, if any, in microbatch 1 of the third step, once every process is in that step."""

    def __init__(self, fault):
        super().__init__(4, 4)
        self.fault, self.forwards = fault, 0
        self.store = dist.distributed_c10d._get_default_store().clone()

    def forward(self, x):
        self.forwards += 1
        if self.forwards == 2 * MICROBATCHES + 1:
            self.store.add("in the third step", 1)
        elif self.forwards == 2 * MICROBATCHES + 2 and self.fault is not None:
            while self.store.add("in the third step", 0) < dist.get_world_size():
                time.sleep(0.01)
            self.fault()
        return super().forward(x)


def complain():
    raise ValueError("poisoned")


def fail(victim, fault, carrier, late=0.0):
    """``late``: seconds from when another process hears of the failure to when it ends a wait."""
    if carrier == "torch":
        from pipeline_ext.engines.cuda import nccl

        nccl.carrier = lambda: "torch"
        if late and dist.get_rank() != victim:
            os.environ["TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC"] = "1"  # torch would act after a minute
            abort = nccl.TorchPair.abort
            nccl.TorchPair.abort = lambda pair: (time.sleep(late), abort(pair))
    stages = [Counted(fault if rank == victim else None) for rank in range(dist.get_world_size())]
    pipe = pipeline(stages, timeout=5)
    x, y = torch.randn(2, 16, 4)
    with pytest.raises(pe.PipelineError) as failed:
        for _ in range(6):  # others may have enqueued the third when they hear of the failure
            pipe.step(x, target=y)
    assert all(p.grad is None for module in pipe.stage_modules for p in module.parameters())
    torch.cuda.synchronize(device())  # no kernel waits for the process that failed
    with pytest.raises(pe.DeadPipeline, match="it failed in one of its processes"):
        pipe.step(x, target=y)
    pipe.close()
    return type(failed.value), str(failed.value)


@pytest.mark.parametrize("carrier", ["CuPy", "torch"])
@pytest.mark.parametrize("fault", [complain, die, freeze])
@pytest.mark.parametrize("size, victim", [(2, 0), (2, 1), (4, 1)])
def test_every_other_process_names_the_one_that_failed_and_no_gpu_waits(size, victim, fault, carrier):
    if size > GPUS:
        pytest.skip(f"needs {size} GPUs, and torch sees {GPUS}")
    if carrier == "CuPy":
        pytest.importorskip("cupy")
    found = outcomes(size, fail, victim, fault, carrier, timeout=100)
    of_victim = found.pop(victim)
    if fault is complain:
        assert isinstance(of_victim, tuple), of_victim
        assert of_victim[0] is pe.StageError and "raised ValueError: poisoned" in of_victim[1]
    else:
        assert isinstance(of_victim, Gone), of_victim
    for outcome in found:
        assert isinstance(outcome, tuple), outcome
        kind, text = outcome
        # Who waits for a process that has gone without a word runs out of time.
        kinds = (pe.PeerError, pe.DeadPipeline, *([pe.StepTimeout] if fault is not complain else []))
        assert kind in kinds, text
        assert f"process {victim}" in text
        assert "every .grad of the model is None" in text


@pytest.mark.skipif(GPUS < 4, reason=f"needs four GPUs, and torch sees {GPUS}")
def test_torch_does_not_end_a_process_that_is_late_to_abort_what_another_has_aborted():
    first, _, *rest = outcomes(4, fail, 1, complain, "torch", 2.0, timeout=100)
    for outcome in [first, *rest]:
        assert isinstance(outcome, tuple) and "process 1 failed" in outcome[1], outcome
