"""The drop-in for torch.distributed.pipelining on a GPU, in two processes that share it."""

import sys

import pytest
import torch
from launcher import torchrun

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("name", ["1F1B", "Interleaved1F1B", "ZBVZeroBubble"])
def test_gradients_are_those_of_the_whole_model_within_rounding(name, tmp_path):
    ran = torchrun(2, [__file__, name, "cuda:0"], tmp_path)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ran.stdout.count("gradients are equal within rounding") == 2


def main(name, device):
    """One of the processes."""
    import torch.distributed as dist
    from torch import nn
    from torch.nn.functional import mse_loss

    from pipeline_ext import pipelining

    dist.init_process_group("gloo")
    rank, device = dist.get_rank(), torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(4))).to(device)
    numbers = {"1F1B": [rank], "Interleaved1F1B": [rank, rank + 2], "ZBVZeroBubble": [rank, 3 - rank]}[name]
    count = 2 * len(numbers)
    modules = {s: nn.Sequential(*model[s * 4 // count : (s + 1) * 4 // count]) for s in numbers}
    stages = [pipelining.PipelineStage(module, s, count, device) for s, module in modules.items()]
    make = pipelining.schedules.get_schedule_class(name)
    schedule = make(stages if len(stages) > 1 else stages[0], 4, loss_fn=mse_loss)
    for rows in (16, 13):
        x, y = torch.randn(2, rows, 64, device=device)
        model.zero_grad()
        mse_loss(model(x), y).backward()
        expected = {of: parameter.grad for of, parameter in model.named_parameters()}
        model.zero_grad()
        losses = []
        schedule.step(*([x] if 0 in numbers else []), target=y if count - 1 in numbers else None, losses=losses)
        for of, parameter in model.named_parameters():
            if any(parameter is mine for module in modules.values() for mine in module.parameters()):
                torch.testing.assert_close(parameter.grad, expected[of])
        assert all(loss.device == device for loss in losses)
    print("gradients are equal within rounding", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
