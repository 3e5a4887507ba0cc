"""Models drawn at random, cut at random: the gradients of plain autograd bit for bit, or a refusal."""

import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pipeline_ext as pe

WIDTH = 6
SCHEDULES = [name for name in pe.schedule_names() if name not in ("dualpipe", "auto", "zb-auto")]


class Layer(nn.Module):
    """One of a chain that hands on a tensor, or a tree of what later layers use."""

    def __init__(self, rng, index, first, last, dtype):
        super().__init__()
        self.first, self.last = first, last
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.uses_mask, self.uses_positions, self.uses_early = (rng.random() < p for p in (0.6, 0.4, 0.5))
        self.keeps_early = index == 0 or rng.random() < 0.2
        self.drops = rng.choice([0.0, 0.0, 0.3])
        self.recomputes = rng.choice([None, None, True])
        self.detaches = rng.random() < 0.1
        self.in_place = rng.random() < 0.3
        self.norm = rng.choice([None, nn.LayerNorm(WIDTH, dtype=dtype)])
        self.idle = nn.Parameter(torch.ones(2)) if rng.random() < 0.1 else None
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x, mask=None, positions=None, ids=None):
        state = (
            {"h": x, "mask": mask, "positions": positions, "early": x, "ids": ids} if self.first else dict(x)
        )
        h = state["h"]
        self.count += 1 if self.recomputes is None else 0
        if self.recomputes is None:
            h = self._mix(h, state)
        else:
            h = checkpoint(self._mix, h, state, use_reentrant=False)
        state["h"] = h
        if self.keeps_early:
            state["early"] = h.detach() if self.detaches else h
        return h if self.last else state

    def _mix(self, h, state):
        if self.norm is not None:
            h = self.norm(h)
        out = F.dropout(self.linear(h), self.drops)
        out = (out.add_(0.5) if self.in_place else out).tanh()
        if self.uses_mask and state["mask"] is not None:
            out = out * state["mask"].to(out.dtype)
        if self.uses_positions and state["positions"] is not None:
            out = out + state["positions"].to(out.dtype)
        if self.uses_early:
            out = out + state["early"] * 0.1
        return h + out


class Tied(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, h):
        return h @ self.weight.T


def draw(seed):
    """A model, how it is cut and run, and a batch."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
    count = rng.randint(2, 6)
    layers = [Layer(rng, i, i == 0, i == count - 1, dtype) for i in range(count)]
    tied = rng.random() < 0.2
    if tied:
        layers.append(Tied(layers[0].linear))
    if rng.random() < 0.3 and len(layers) > 2:  # some in a container, or with a hook
        layers[-2:] = [nn.Sequential(*layers[-2:])]
    if rng.random() < 0.2:
        rng.choice(layers).register_forward_hook(lambda module, args, out: out)
    model = nn.Sequential(*layers)
    stages = rng.randint(1, min(len(layers), 4))
    microbatches = rng.randint(1, 5)
    rows = microbatches + rng.randint(0, 5)
    kwargs = {}
    if rng.random() < 0.5:
        kwargs["mask"] = (
            pe.whole(torch.rand(WIDTH) > 0.3) if rng.random() < 0.5 else torch.rand(rows, WIDTH) > 0.3
        )
    if rng.random() < 0.4:
        kwargs["positions"] = rng.choice(
            [pe.whole(torch.arange(float(WIDTH))), pe.whole(torch.randn(1, WIDTH))]
        )
    if rng.random() < 0.3:
        kwargs["ids"] = rng.choice([None, "text", 3, pe.rows([f"row {i}" for i in range(rows)])])
    x = torch.randn(rows, WIDTH, dtype=dtype, requires_grad=rng.random() < 0.2)
    y = torch.randn(rows, WIDTH, dtype=dtype)
    options = {
        "schedule": rng.choice([s for s in SCHEDULES if pe._C.layout_of(s) == "linear" or stages % 2 == 0]),
        "overlap": rng.random() < 0.3,
        "pack": rng.choice([1, 1, 2, "all"]) if microbatches > 1 else 1,
    }
    if pe._C.layout_of(options["schedule"]) != "linear":
        options["devices"] = ["cpu"] * (stages // 2)
    return model, tied, stages, microbatches, (x,), kwargs, y, options


def check(seed):
    model, tied, stages, microbatches, args, kwargs, y, options = draw(seed)
    try:
        pipe = pe.Pipeline(model, stages, microbatches, loss_fn=F.mse_loss, timeout=30, **options)
    except (pe.InvalidSchedule, pe.InvalidArgument):
        return "refused"
    with pipe:
        try:
            report = pipe.verify(*args, target=y, **kwargs)
            again = pipe.verify(*args, target=y, **kwargs)
        except (pe.InvalidArgument, pe.StageError) as refused:
            cause = refused.__cause__ or refused
            assert isinstance(cause, (pe.PipelineError, NotImplementedError)), f"seed {seed}: {refused}"
            return "refused"
        for found in (report, again):
            exact = found.bit_for_bit or (tied and found.worst_microbatched < 1e-2)
            assert exact, f"seed {seed}, {options}:\n{found}"
    return "right"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("part", range(10))
def test_right_or_refused(part):
    """500 seeds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [check(seed) for seed in range(part * 50, part * 50 + 50)]
    assert found.count("right") >= 30, found
