"""A plugin of pytest: tests that were written for a double of torch.cuda run with the real one instead.

They compare with plain autograd on the CPU. Those that read the log of the driver's calls stay with the double,
where nothing else calls it.
"""

import device_double
import pytest
import reference
import torch

from pipeline_ext.engines.cuda import torch_side

IN_OTHER_ORDER = "the fused kernel adds in another order than the CPU's"
OF_THE_DOUBLE = "it looks into the double"
ON_CPU = "it runs a copy of what the pipeline has moved, or gives it new layers, on the CPU"
TESTS = {
    "test_recurrent_layers_hold_the_aliases_in_their_own_list_too": IN_OTHER_ORDER,
    "test_stages_draw_the_same_whatever_the_schedule": OF_THE_DOUBLE,
    "test_gradients_under_bf16_autocast": "on GPUs autocast takes other operators in bfloat16",
    "test_one_and_two_intra_op_threads_each_equal_their_reference": "threads of the CPU compute nothing there",
    "test_torch_profiler_records_all_ranks_operations": "operators run twice: on the device, and as the CPU's",
    "test_a_step_inside_a_capture_of_the_callers_is_refused_and_nothing_is_lost": OF_THE_DOUBLE,
    "test_a_launch_that_fails_leaves_no_gradients": OF_THE_DOUBLE,
    "test_a_step_is_one_launch_and_asks_the_driver_little_else": OF_THE_DOUBLE,
    "test_the_graph_has_the_edges_of_the_plan_and_backwards_go_first": OF_THE_DOUBLE,
    "test_several_gpus_run_eagerly": "it needs two GPUs; the others of its file take one",
    "test_train_and_eval_mode_are_the_users": ON_CPU,
    "test_tied_parameters_may_be_replaced": ON_CPU,
    "test_tied_parameters_on_different_stages_are_summed": ON_CPU,
    "test_gradients_add_up_and_optimizers_step_between_graphs": ON_CPU,
    "test_new_shapes_modes_and_memory_are_captured_anew": ON_CPU,
    "test_an_optimizer_inside_the_graph": ON_CPU,
    "test_what_is_replaced_in_a_model_is_noticed": ON_CPU,
    "test_an_optimizers_state_and_settings_are_noticed": ON_CPU,
}

_equal, _twin, _gradients = torch.equal, reference.twin, reference.gradients


def pytest_configure(config) -> None:
    torch.equal = lambda a, b: _equal(a.detach().cpu(), b.detach().cpu())
    reference.twin = lambda model: _twin(model).cpu()
    reference.gradients = lambda model: {
        name: None if grad is None else grad.cpu() for name, grad in _gradients(model).items()
    }
    assert_close = torch.testing.assert_close
    torch.testing.assert_close = lambda a, b, **options: assert_close(a, b, check_device=False, **options)
    device_double.install = _install


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if reason := TESTS.get(item.originalname):
            item.add_marker(pytest.mark.skip(reason=reason))


class Real:
    """What tests ask of a double.

    Attributes:
        launches: of graphs.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.launches = 0
        replay = torch_side.Graph.replay

        def counted(graph) -> None:
            self.launches += 1
            replay(graph)

        monkeypatch.setattr(torch_side.Graph, "replay", counted)

    @property
    def capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()


def _install(monkeypatch, standin, devices=2) -> Real:
    return Real(monkeypatch)
