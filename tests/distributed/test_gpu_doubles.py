"""Pipelines whose ranks are processes with a GPU each, played on the CPU: gradients, messages, order, failures."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpu_processes import install
from models import chain
from processes import Failed, outcomes, run
from reference import gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext import _C

NAMES = [name for name in _C.schedule_names() if name != "dualpipe"]  # which has a second copy of the stages


def pipeline(model, stages, microbatches, **options):
    options = {"loss_fn": F.mse_loss, "timeout": 20, **options}
    return pe.Pipeline(
        model, stages, microbatches, mesh=dist.group.WORLD, devices=["cuda:0"], **options
    )


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
