"""Costs as JSON files."""

import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pipeline_ext as pe


def load(tmp_path, text):
    path = tmp_path / "costs.json"
    path.write_text(text if isinstance(text, str) else json.dumps(text))
    return pe.Costs.load(path)


@pytest.mark.parametrize(
    "costs",
    [
        pe.Costs(),
        pe.Costs(bandwidth=[1e9, math.inf], latency=[0.1, 0.2], message_bytes=4096.0, forward=[1.0, 2.0, 0.5]),
        pe.Costs(input_grad=0.7, weight_grad=1.1, mem_i=0.25, mem_w=[0.75, 0.5], pair=0.8, contention=1.2),
        pe.Costs(memory_limit=[8.0, 9.0], act_memory=[1.0, 2.0, 3.0, 4.0]),
        pe.Costs(microbatch=[1.0, 0.5, 6.0]),
        pe.Costs(microbatch=[[1.0, 0.5], [2.0, 0.25]], forward=[1.0, 2.0]),
        pe.Costs(microbatch=[[[1.0, 1.5, 0.5, 2.0]] * 3] * 2),
    ],
)
def test_what_is_saved_is_loaded(tmp_path, costs):
    costs.save(tmp_path / "costs.json")
    text = (tmp_path / "costs.json").read_text()
    json.loads(text, parse_constant=pytest.fail)  # no Infinity, which not every reader knows
    assert pe.Costs.load(tmp_path / "costs.json") == costs


def test_what_is_left_out_or_null_has_its_default(tmp_path):
    assert load(tmp_path, {}) == pe.Costs()
    assert load(tmp_path, {"forward": [1, 2], "input_grad": None}) == pe.Costs(forward=[1.0, 2.0])


@pytest.mark.parametrize(
    "text, said",
    [
        ("{", "are not JSON"),
        ("[1, 2]", "are not a JSON object"),
        ({"forwards": 1}, "'forwards' in .*costs.json' is not a cost; the costs are forward, backward"),
        ({"forward": -1}, "'forward' in .*costs.json' is -1; give a finite number of at least 0"),
        ('{"weight_grad": [1, NaN]}', "'weight_grad' in .*' holds NaN; .*, or a list of one for each stage"),
        ('{"latency": Infinity}', "'latency' in .* is Infinity; .* one for each boundary"),
        ({"bandwidth": 0}, "'bandwidth' in .* is 0; give a number above 0"),
        ({"pair": [1, 1]}, r"'pair' in .* is \[1, 1\]; give a number above 0$"),
        ({"contention": 0.5}, "'contention' in .* is 0.5; give a finite number of at least 1$"),
        ({"memory_limit": "4 GB"}, "'memory_limit' in .* is \"4 GB\"; .* one for each rank"),
        ({"forward": True}, "'forward' in .* is true"),
        (
            {"forward": [1, 2, 3], "latency": [0, 0, 0]},
            "'latency' in .* has 3 entries, for 4 stages, and 'forward' has 3, for 3",
        ),
    ],
)
def test_what_is_no_cost_is_refused_by_key_and_file(tmp_path, text, said):
    with pytest.raises(pe.InvalidArgument, match=said):
        load(tmp_path, text)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(pe.InvalidArgument, match="nowhere.json' cannot be read: No such file"):
        pe.Costs.load(tmp_path / "nowhere.json")


def test_what_a_pipeline_measured_is_saved_for_the_planner(tmp_path):
    layers = [nn.Linear(8, 8) for _ in range(3)]
    with pe.Pipeline(layers, microbatches=4, loss_fn=F.mse_loss) as pipe:
        pipe.step(torch.randn(8, 8), target=torch.randn(8, 8))
        pipe.profile().save(tmp_path / "costs.json")
        costs = pe.Costs.load(tmp_path / "costs.json")
        assert costs == pipe.profile().costs(pipe.plan)
        assert pe.simulate(pipe.plan, costs).makespan == pipe.simulate().makespan
