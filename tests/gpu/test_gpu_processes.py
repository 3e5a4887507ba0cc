"""Processes with a GPU each, over NCCL, started by torchrun: gradients near those of the whole model on one."""

import os
import sys

import pytest
import torch
import torch.nn.functional as F
from launcher import torchrun

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs, and torch sees {GPUS}"),
]

CASES = {
    "1f1b": {},
    "without CuPy": {},
    "packed": {"pack": 4, "pack_forward": 2},
    "interleaved": {"schedule": "interleaved-1f1b"},
    "graphs": {"graphs": True},
    "replicas": {},
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_whole_model_within_rounding(case, tmp_path):
    ranks = 4 if GPUS >= 4 else 2
    ran = torchrun(ranks, [__file__, case], tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("gradients are equal within rounding") == ranks


def main(case):
    """One of the processes."""
    from models import Residual
    from reference import gradients, reference_step, twin
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh

    import pipeline_ext as pe
    from pipeline_ext.engines.cuda import nccl

    if case == "without CuPy":
        nccl.carrier = lambda: "torch"
    ranks, gpu = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(gpu)
    replicas = 2 if case == "replicas" else 1
    ranks //= replicas
    torch.distributed.init_process_group("nccl")  # which has no connections between CPUs
    mesh = init_device_mesh("cuda", (replicas, ranks), mesh_dim_names=("dp", "pp"))
    number = mesh["dp"].get_local_rank()
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(64) for _ in range(8)))
    plain = twin(model).cuda()
    stages = 2 * ranks if case == "interleaved" else ranks
    with pe.Pipeline(model, stages, 8, loss_fn=F.mse_loss, mesh=mesh, timeout=60, **CASES[case]) as pipe:
        for step in range(8):
            rows = 40 if step == 4 else 32  # another shape, between steps of one
            batches = torch.randn(replicas, 2, rows, 64)
            model.zero_grad()
            plain.zero_grad()
            x, y = batches[number]
            loss = pipe.step(x, target=y)
            expected = [reference_step(plain, *batch.cuda(), 8, F.mse_loss) for batch in batches]
            assert loss.item() == pytest.approx(expected[number].item(), rel=1e-5)
            grads = {name: grad / replicas for name, grad in gradients(plain).items()}
            for name, parameter in pipe.named_parameters():
                largest = grads[name].abs().max()
                assert (parameter.grad - grads[name]).abs().max() <= 1e-4 * largest, name
        assert case != "graphs" or (pipe.graph.fallback is None and pipe.graph.captured >= 1)
        out = pipe.eval(x)
        assert out is None or torch.allclose(out, plain(x.cuda()), atol=1e-4)
    print("gradients are equal within rounding", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
