"""A mean over what counts, where the rows of a batch do not count alike."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from reference import gradients, twin
from replicas import Replicas
from torch import nn

import pipeline_ext as pe

VOCABULARY = 17


def model():
    return nn.Sequential(nn.Embedding(VOCABULARY, 8), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, VOCABULARY))


def cross_entropy(out, target):
    return F.cross_entropy(out.flatten(0, 1), target.flatten(), ignore_index=-100)


def batch(rows=8, empty=False):
    ids, target = torch.randint(VOCABULARY, (rows, 6)), torch.randint(VOCABULARY, (rows, 6))
    target[:2, 0 if empty else 1 :] = -100
    target[2:4, 3:] = -100
    return ids, target


def assert_whole_batch(found, loss, plain, ids, target):
    expected = cross_entropy(plain(ids), target)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    wanted = gradients(plain)
    for name, p in found.named_parameters():
        torch.testing.assert_close(p.grad, wanted[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zb-h1", "interleaved-1f1b"])
@pytest.mark.parametrize("empty", [False, True], ids=["uneven", "a microbatch without labels"])
def test_the_loss_is_that_of_the_whole_batch(schedule, empty):
    trained, (ids, target) = model(), batch(empty=empty)
    plain = twin(trained)
    devices = ["cpu"] if schedule.startswith("interleaved") else None
    with pe.Pipeline(
        trained, 2, 4, schedule, cross_entropy, loss_weight=pe.count_not(-100), devices=devices
    ) as pipe:
        losses = []
        loss = pipe.step(ids, target=target, losses=losses)
        assert_whole_batch(trained, loss, plain, ids, target)
        assert len(losses) == 4 and losses[0].isnan() == empty
        assert pipe.verify(ids, target=target).ok


def test_the_target_may_be_a_pytree_or_given_by_microbatch():
    trained, (ids, target) = model(), batch()
    plain = twin(trained)
    with pe.Pipeline(
        trained,
        2,
        4,
        loss_fn=lambda out, t: cross_entropy(out, t["labels"]),
        loss_weight=pe.count_not(-100),
    ) as pipe:
        loss = pipe.step(ids, target={"labels": target, "name": "text"})
        assert_whole_batch(trained, loss, plain, ids, target)
        trained.zero_grad()
        plain.zero_grad()
        cuts = (0, 1, 4, 5, 8)
        loss = pipe.step(
            arg_mbs=[ids[a:b] for a, b in itertools.pairwise(cuts)],
            target_mbs=[{"labels": target[a:b]} for a, b in itertools.pairwise(cuts)],
        )
        assert_whole_batch(trained, loss, plain, ids, target)


def test_with_a_scaler():
    trained, (ids, target) = model(), batch(empty=True)
    plain = twin(trained)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with pe.Pipeline(
        trained, 2, 4, loss_fn=cross_entropy, loss_weight=pe.count_not(-100), scaler=scaler
    ) as pipe:
        loss = pipe.step(ids, target=target)
    for p in trained.parameters():
        p.grad /= 8
    assert_whole_batch(trained, loss, plain, ids, target)


def test_the_counts_of_replicas_are_summed():
    trained, (ids, target) = model(), batch(rows=16, empty=True)
    target[8:10] = -100
    plain = twin(trained)
    with Replicas(trained, 2, 4, loss_fn=cross_entropy, loss_weight=pe.count_not(-100)) as replicas:
        losses = replicas.step([(ids[:8], target[:8]), (ids[8:], target[8:])])
        assert_whole_batch(replicas.models[0], sum(losses) / 2, plain, ids, target)
        with pytest.raises(pe.InvalidArgument, match=r"no_sync does not share.*loss_reduction=.sum."):
            with replicas.pipes[0].no_sync():
                replicas.pipes[0].step(ids, target=target)


def test_labels_of_minus_100_are_refused_until_it_is_said_what_counts():
    trained, (ids, target) = model(), batch()
    with pe.Pipeline(trained, 2, 4, loss_fn=cross_entropy) as pipe:
        with pytest.raises(pe.InvalidArgument, match=r"labels of -100.*count_not\(-100\).*loss_weight=.rows."):
            pipe.step(ids, target=target)
        assert trained[0].weight.grad is None
        pipe.step(ids, target=target.clamp(min=0))
        pipe.step(ids, target=torch.cat([target[:, :1], target[:, 1:].fill_(-100)], 1))  # as many in each
    _, target = batch()
    with pe.Pipeline(trained, 2, 4, loss_fn=cross_entropy, loss_weight="rows") as pipe:
        loss = pipe.step(ids, target=target)
        mean = sum(cross_entropy(trained(a), b) for a, b in zip(ids.chunk(4), target.chunk(4))) / 4
        torch.testing.assert_close(loss, mean.detach())
        assert "it is no mean over rows" in str(pipe.verify(ids, target=target))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_weight": 3}, "loss_weight is 3; give a function"),
        ({"loss_weight": pe.count_not(-100), "loss_reduction": "sum"}, "leave one of them out"),
        ({"loss_weight": pe.count_not(-100), "graphs": True}, "do not go together.*loss_reduction="),
    ],
)
def test_what_does_not_go_with_it_is_refused(options, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.Pipeline(model(), 2, 4, loss_fn=cross_entropy, **options)


@pytest.mark.parametrize(
    ("weight", "target", "message"),
    [
        (lambda t: -1, True, "loss_weight returned -1 for microbatch 0"),
        (lambda t: torch.tensor(float("nan")), True, "at least 0"),
        (lambda t: "many", True, "returned 'many'"),
        (lambda t: 0, True, "returned 0 for every microbatch"),
        (pe.count_not(0), None, "step was given neither; give target="),
        (pe.count_not(0), (1, 2), "this one holds 0"),
    ],
)
def test_weights_that_are_none_are_refused(weight, target, message):
    trained, (ids, labels) = model(), batch()
    loss_fn = cross_entropy if target is True else lambda out, *_: out.sum()
    with pe.Pipeline(trained, 2, 4, loss_fn=loss_fn, loss_weight=weight) as pipe:
        with pytest.raises(pe.InvalidArgument, match=message):
            pipe.step(ids, target=labels if target is True else target)
        assert trained[0].weight.grad is None
