"""Where models are cut, and what is refused."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from reference import assert_same_gradients, gradients, reference_step, twin
from torch import nn

import pipeline_ext as pe
from pipeline_ext.model.cut import balanced, cut


def sizes(stages):
    return [len(stage.layers) for stage in stages]


@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_the_heaviest_part_is_as_light_as_it_can_be(weights, parts):
    parts = min(parts, len(weights))

    def heaviest(starts):
        ends = [*starts[1:], len(weights)]
        return max(sum(weights[a:b]) for a, b in zip(starts, ends))

    starts = balanced(weights, parts)
    assert starts[0] == 0 and all(a < b for a, b in itertools.pairwise(starts))
    assert len(starts) == parts and starts[-1] < len(weights)
    cuts = itertools.combinations(range(1, len(weights)), parts - 1)
    assert heaviest(starts) == min(heaviest([0, *c]) for c in cuts)


def test_by_parameters():
    model = nn.Sequential(nn.Linear(100, 100), *(nn.Linear(10, 10) for _ in range(6)))
    assert sizes(cut(model, 2)) == [1, 6]


def test_layers_without_parameters_spread_evenly():
    assert sizes(cut(nn.Sequential(*(nn.ReLU() for _ in range(6))), 3)) == [2, 2, 2]


def test_by_time():
    class Slow(nn.Linear):
        def forward(self, x):
            for _ in range(30):
                x = super().forward(x)
            return x

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)), Slow(64, 64))
    before = [b.clone() for b in model.state_dict().values()]
    sample = torch.randn(64, 64)
    rng = torch.get_rng_state()
    assert sizes(cut(model, 2, balance="time", sample=sample)) == [5, 1]
    assert all(map(torch.equal, model.state_dict().values(), before))
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), rng)


def test_by_time_leaves_buffers_alone_and_takes_ids():
    model = nn.Sequential(nn.Embedding(9, 4), nn.BatchNorm1d(4), nn.ReLU(inplace=True), nn.Linear(4, 4))
    cut(model, 2, balance="time", sample=torch.randint(9, (8,)))
    assert model[1].num_batches_tracked == 0


def test_nested_containers_are_opened():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*(nn.Linear(4, 4) for _ in range(4))), nn.Linear(4, 4))
    stages = cut(model, 3)
    assert [stage.names for stage in stages] == [["0", "1.0"], ["1.1", "1.2"], ["1.3", "2"]]


def test_a_layer_that_stands_twice_runs_twice():
    relu, linear = nn.ReLU(), nn.Linear(4, 4)
    model = nn.Sequential(linear, relu, nn.Linear(4, 4), relu, linear, relu)
    plain, x = twin(model), torch.randn(6, 4)
    expected = reference_step(plain, x, x, 3, F.mse_loss)
    for stages in (1, 2, 3, 6):
        model.zero_grad()
        with pe.Pipeline(model, stages, 3, loss_fn=F.mse_loss) as pipe:
            assert torch.equal(pipe.step(x, target=x), expected)
        for p, q in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(p.grad, q.grad)


def test_a_list_with_a_forward_of_its_own_is_a_layer():
    class Sum(nn.ModuleList):
        def forward(self, x):
            return sum(layer(x) for layer in self)

    model = nn.Sequential(Sum([nn.Linear(4, 4), nn.Linear(4, 4)]), nn.Linear(4, 4))
    assert [stage.names for stage in cut(model, 2)] == [["0"], ["1"]]


def test_a_container_with_hooks_is_kept_whole():
    inner = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    inner.register_full_backward_hook(lambda *_: None)
    assert [stage.names for stage in cut(nn.Sequential(inner, nn.Linear(4, 4)), 2)] == [["0"], ["1"]]


class InOrder(nn.Sequential):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.Sequential(*(nn.Linear(4, 4) for _ in range(4)))
        self.head = nn.Linear(4, 4)


def test_a_module_with_children_in_order_is_cut_by_name():
    model, x = InOrder(), torch.randn(6, 4)
    plain = twin(model)
    reference_step(plain, x, x, 3, F.mse_loss)
    with pe.Pipeline(model, microbatches=3, loss_fn=F.mse_loss, cuts=["blocks.1", "head"]) as pipe:
        assert pipe.num_stages == 3
        assert [s.names for s in pipe.stage_modules] == [
            ["embed", "blocks.0"],
            ["blocks.1", "blocks.2", "blocks.3"],
            ["head"],
        ]
        pipe.step(x, target=x)
    assert_same_gradients(model, gradients(plain))
    assert [s.names[0] for s in cut(model, None, cuts=["blocks"])] == ["embed", "blocks.0"]


def test_a_sequential_is_cut_by_position():
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)))
    assert sizes(cut(model, 3, cuts=[1, 4])) == [1, 3, 1]


@pytest.mark.parametrize(
    "model, options, message",
    [
        (nn.Sequential(nn.LazyLinear(4)), {"num_stages": 1}, "lazy parameters"),
        (InOrder(), {"cuts": "head"}, r"cuts is 'head'; give a list.*cuts=\['head'\]"),
        (InOrder(), {"cuts": [1.5]}, "cuts is .1.5.; give a list"),
        (nn.Sequential(), {"cuts": ["x"]}, "no child modules"),
        (InOrder(), {"cuts": ["block.2"]}, "no layer 'block.2'.*nearest name is 'blocks.2'"),
        (InOrder(), {"cuts": ["embed"]}, "cuts must ascend"),
        (InOrder(), {"cuts": ["head", "blocks.1"]}, "cuts must ascend"),
        (InOrder(), {"cuts": ["head"], "num_stages": 3}, "1 cuts make 2 stages, but num_stages is 3"),
        (InOrder(), {"cuts": [9]}, "no layer 9; there are 6"),
        (nn.Sequential(nn.Linear(4, 4)), {"num_stages": 2}, "1 layers and cannot be cut into 2"),
        (nn.Sequential(nn.Linear(4, 4)), {}, "num_stages is missing"),
        (nn.Sequential(nn.Linear(4, 4)), {"num_stages": 1, "balance": "size"}, "balance is 'size'"),
        (nn.Sequential(nn.Linear(4, 4)), {"num_stages": 1, "balance": "time"}, "give its input as sample="),
        ([nn.Linear(4, 4)], {"num_stages": 2}, "num_stages is 2 but the list holds 1"),
        ([nn.Linear(4, 4)], {"cuts": ["0"]}, "cuts does not go with a list"),
        ([], {}, "a list of stages holds one nn.Module or more"),
        (["x"], {}, "a list of stages holds one nn.Module or more"),
        (lambda x: x, {"num_stages": 1}, "model is a function; give an nn.Module"),
    ],
)
def test_what_cannot_be_cut_is_refused_with_advice(model, options, message):
    with pytest.raises(pe.InvalidArgument, match=message):
        pe.Pipeline(model, microbatches=2, loss_fn=F.mse_loss, **options)
