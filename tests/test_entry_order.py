"""step(microbatch_work=): unequal microbatches enter in an order that is chosen and declared."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pipeline_ext as pe
from pipeline_ext.step.entry_order import check_reorders

M = 6


def model():
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]


def plain(stages, parts, targets):
    """Accumulation over microbatches in this order; the losses and the gradients."""
    whole = nn.Sequential(*stages)
    rows = sum(map(len, parts))
    losses = []
    for x, y in zip(parts, targets):
        losses.append(F.mse_loss(whole(x), y))
        (losses[-1] * (len(x) / rows)).backward()
    return [loss.detach() for loss in losses], [p.grad.clone() for p in whole.parameters()]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=M, max_size=M),
    st.sampled_from(["1f1b", "gpipe", "zb-h1"]),
    st.booleans(),
)
def test_gradients_are_those_of_the_order_and_losses_and_outputs_as_given(sizes, schedule, presplit):
    x, y = torch.randn(sum(sizes), 5), torch.randn(sum(sizes), 5)
    if presplit:
        parts, targets = x.split(sizes), y.split(sizes)
        batch = {"arg_mbs": [(part,) for part in parts], "target_mbs": list(targets)}
    else:
        parts, targets = x.tensor_split(M), y.tensor_split(M)
        batch = {"target": y}
    stages = model()
    with pe.Pipeline(stages, None, M, schedule, loss_fn=F.mse_loss) as pipe:
        losses: list = []
        args = () if presplit else (x,)
        loss, out = pipe.step(*args, **batch, microbatch_work=sizes, losses=losses, return_outputs=True)
        order = pipe.entry_order.order
        found = [p.grad.clone() for stage in stages for p in stage.parameters()]
        for stage in stages:
            stage.zero_grad()
        assert sorted(order) == list(range(M))
        assert pipe.entry_order.makespan <= pipe.entry_order.given
        whole = nn.Sequential(*stages)
        assert torch.equal(out, torch.cat([whole(part) for part in parts]))
        expected_losses, expected = plain(stages, [parts[i] for i in order], [targets[i] for i in order])
        assert [loss.item() for loss in losses] == [expected_losses[order.index(i)].item() for i in range(M)]
        assert all(map(torch.equal, found, expected))
        assert torch.allclose(loss, sum(part * len(t) / len(x) for part, t in zip(losses, targets)))
        for stage in stages:
            stage.zero_grad()
        pipe.step(*args, **batch)
        assert pipe.entry_order is None


def test_an_order_other_than_the_given_one_is_found():
    sizes = [6, 1, 1, 1, 1, 6]
    x = torch.randn(sum(sizes), 5)
    with pe.Pipeline(model(), None, M, "1f1b", loss_fn=F.mse_loss) as pipe:
        pipe.step(
            arg_mbs=[(part,) for part in x.split(sizes)], target_mbs=x.split(sizes), microbatch_work=sizes
        )
        assert pipe.entry_order.order != list(range(M))
        assert pipe.entry_order.makespan < pipe.entry_order.given


@pytest.mark.parametrize(
    "work", [[1] * (M - 1), [1] * M + [2], [-1] * M, [float("nan")] * M, "123456", 3, [True] * M]
)
def test_work_that_cannot_be_is_refused_before_anything_runs(work):
    stages = model()
    with pe.Pipeline(stages, None, M, loss_fn=F.mse_loss) as pipe:
        x = torch.randn(12, 5)
        with pytest.raises(
            pe.InvalidArgument, match=f"give a number of at least 0 for each of the {M} microbatches"
        ):
            pipe.step(x, target=x, microbatch_work=work)
        assert all(p.grad is None for stage in stages for p in stage.parameters())
        pipe.step(x, target=x, microbatch_work=torch.ones(M))


@pytest.mark.parametrize(
    "where, said", [((True, False), "all of them the microbatches"), ((False, True), "graphs")]
)
def test_it_is_refused_where_microbatches_enter_as_given(where, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        check_reorders(*where)
