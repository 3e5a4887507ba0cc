"""What holds for stages on threads holds for stages on streams: the tests of the one, on a GPU's double."""

import pytest
import test_boundary
import test_context
import test_models
import test_state_dict
from device_double import install

DIFFERENT = {
    "test_recomputed_batch_norm_is_refused_where_it_would_race": "overlap is what streams do by default",
    "test_hooks_on_parameters_run": "gradients are added outside of autograd",
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
