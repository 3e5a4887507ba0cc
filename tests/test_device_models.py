"""What holds for stages on threads holds for stages on streams: the tests of the one, on a GPU's double."""

import pytest
import test_boundary
import test_context
import test_models
import test_state_dict
import torch
import torch.nn.functional as F
from device_double import install
from torch import nn

import pipeline_ext as pe

DIFFERENT = {
    "test_recomputed_batch_norm_is_refused_where_it_would_race": "overlap is what streams do by default",
    "test_parameters_reached_through_a_closure_get_their_gradients": "a loss sees its own stage's aliases",
    "test_thread_locals_last_from_task_to_task_and_step_to_step": "stages run on the caller's thread",
    "test_leaves_but_for_the_first_microbatch_of_a_step": "1F1B begins with two forwards, as it overlaps",
    "test_a_stage_that_begins_to_work_in_place": "as above",
    "test_a_loss_that_works_in_place_for_one_microbatch_costs_one_step": "as above",
}


@pytest.fixture(autouse=True)
def one_gpu(standin, monkeypatch):
    """So that pipelines run there by default."""
    return install(monkeypatch, standin, devices=1)


for module in (test_boundary, test_context, test_models, test_state_dict):
    tests = {name: test for name, test in vars(module).items() if name.startswith("test_")}
    globals().update({name: test for name, test in tests.items() if name not in DIFFERENT})


class Noisy(nn.Module):
    """Adds what it was given, with noise, to every layer: all stages compute that."""

    def __init__(self, noise, skips=0.0):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(4))
        self.noise, self.skips = noise, skips

    def forward(self, x):
        noisy = self.noise(x)
        for layer in self.layers:
            if torch.rand([]) >= self.skips:
                x = layer(x) + noisy
        return x


def test_code_around_units_that_draws_random_numbers_is_refused_on_gpus_and_the_advice_works():
    x, y = torch.randn(8, 6), torch.randn(8, 6)
    options = {"loss_fn": F.mse_loss, "sample": x}
    with pytest.raises(pe.InvalidArgument, match=r"Noisy around its units draws .*bernoulli.*as nn\.Dropout"):
        pe.Pipeline(Noisy(F.dropout), 2, 4, **options)
    for noise, devices in ((nn.Dropout(), None), (F.dropout, ["cpu", "cpu"])):
        with pe.Pipeline(Noisy(noise), 2, 4, devices=devices, **options) as pipe:
            assert pipe.step(x, target=y).isfinite()
