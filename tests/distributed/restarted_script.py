"""A training script that torchrun starts again, with the lines that docs/failure.md gives.

It takes a folder. Process 1 kills itself in the fourth step, unless it has been started again, or is told
"undisturbed".
"""

import json
import os
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe

STEPS = 6


class Dying(nn.Linear):
    def forward(self, x):
        if step == 3 and dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


torch.manual_seed(0)
folder = Path(sys.argv[1])
dies = "undisturbed" not in sys.argv and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
text = (Path(__file__).parents[2] / "docs" / "failure.md").read_text()
exec(re.search(r"```python\n(.*?)```", text, re.S)[1])

model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Dying(4, 4))
batches = [torch.randn(8, 4) for _ in range(STEPS)]
with pe.Pipeline(model, 2, 4, loss_fn=F.mse_loss, mesh=dist.group.WORLD, timeout=30) as pipe:
    optimizer = torch.optim.Adam(pipe.parameters(), lr=0.1)
    losses = []
    if (folder / "last").exists():
        losses = pe.load_checkpoint(folder / "last", pipe, optimizer)["losses"]
    for step in range(len(losses), STEPS):
        losses.append(pipe.step(batches[step], target=batches[step]).item())
        optimizer.step()
        optimizer.zero_grad()
        pe.save_checkpoint(folder / "last", pipe, optimizer, losses=losses)
if rank == 0:  # noqa: F821  which the lines above have set
    (folder / "losses.json").write_text(json.dumps(losses))
