"""Bad arguments are refused before anything runs, in a sentence that says what is accepted."""

import copy
import io
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

import pipeline_ext as pe


def model():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"microbatches": 0}, "microbatches is 0; give a whole number of at least 1"),
        ({"microbatches": None}, "microbatches is None"),
        ({"microbatches": 2.0}, "microbatches is 2.0"),
        ({"num_stages": True}, "num_stages is True"),
        ({"loss_fn": "mse"}, "loss_fn is 'mse'; give a function"),
        ({"loss_reduction": "max"}, '"mean" or "sum"'),
        ({"timeout": 0}, "timeout is 0; give a positive number of seconds"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"schedule": "1f2b"}, "no schedule '1f2b'; there are gpipe, 1f1b, interleaved-1f1b"),
        ({"schedule": "none.csv"}, "'none.csv' cannot be read"),
        ({"schedule": 3}, "a schedule is a name"),
        ({"schedule": {1: ["0F0"]}}, "number them from 0"),
        ({"schedule": [["0F0", "0B0", "0F1", "0B1"]]}, "num_stages is 2, but the schedule given has 1"),
        ({"schedule": [["0F0", "0B0"], ["1F0", "1B0"]]}, "microbatches is 2, but the schedule given has 1"),
        ({"schedule": [["0F0", "0F1"], ["1F0", "1F1"]]}, "no backward action"),
        ({"devices": ["cuda:0", "cpu"]}, "devices holds cpu and cuda; give all ranks devices of one type"),
        ({"devices": ["gpu"]}, "'gpu', which is no device"),
        ({"devices": "cpu"}, "give a list with one entry for each rank"),
        ({"devices": ["cpu"]}, "exactly one stage on each rank, got 2 stages on 1 ranks"),
        ({"schedule": "interleaved-1f1b", "devices": ["cpu"] * 3}, "same number of stages on each rank"),
    ],
)
def test_pipeline(options, message):
    options = {"num_stages": 2, "microbatches": 2, "loss_fn": F.mse_loss, **options}
    threads = threading.active_count()
    with pytest.raises(pe.InvalidArgument) as caught:
        pe.Pipeline(model(), **options)
    assert message in str(caught.value)
    assert threading.active_count() == threads


def test_interleaved_by_default_holds_two_stages_on_each_rank():
    stages = [nn.Linear(4, 4) for _ in range(3)]
    with pytest.raises(pe.InvalidSchedule, match="num_stages is even; got 3. Give devices="):
        pe.Pipeline(stages, microbatches=2, schedule="interleaved-1f1b")
    with pe.Pipeline(stages + stages[:1], microbatches=2, schedule="interleaved-1f1b") as pipe:
        assert pipe.plan.rank_of_stage == [0, 1, 0, 1]


def test_a_schedule_that_never_ends_is_refused_with_who_waits_for_what():
    order = [["0F0", "0B0", "0F1", "0B1"], ["1F0", "1F1", "1B0", "1B1"]]
    with pytest.raises(pe.InvalidSchedule, match="(?s)never ends.*rank 0: 0B0 waits for 1B0 on rank 1"):
        pe.Pipeline(model(), 2, 2, order, F.mse_loss, reactive=False)


def test_an_offending_cell_is_named_and_shown():
    order = [["0F0", "0B0"], ["1F0", "1B1"]]
    with pytest.raises(pe.InvalidSchedule) as caught:
        pe.Pipeline(model(), 2, 1, order, F.mse_loss)
    assert "rank 1, cell 1 '1B1': stage 1 has no F for microbatch 1" in str(caught.value)
    assert "<-- ERROR HERE (rank 1)" in str(caught.value)


@pytest.mark.parametrize(
    "args, kwargs, message",
    [
        ((torch.randn(3, 4),), {}, "the batch has 3 rows, too few for 4 microbatches.*microbatches=3"),
        ((torch.randn(8, 4),), {"target": torch.randn(7, 4)}, "target has 7 rows where the batch has 8"),
        ((torch.randn(8, 4), torch.randn(6, 4)), {}, r"input \[0\] has 8 rows and input \[1\] has 6"),
        ((torch.randn(8, 4),), {"mask": torch.randn(5)}, r"keyword \['mask'\] has 5"),
        ((), {}, "no inputs are given"),
        ((torch.tensor(1.0),), {}, "no input tensor has a batch dimension"),
        ((torch.randn(8, 4),), {"target": torch.randn(8, 4, requires_grad=True)}, "target requires a grad"),
    ],
)
def test_step(args, kwargs, message):
    ran = []
    stages = model()
    stages[0].register_forward_hook(lambda *_: ran.append(1))
    with pe.Pipeline(stages, 2, 4, loss_fn=F.mse_loss) as pipe:
        with pytest.raises(pe.InvalidArgument, match=message):
            pipe.step(*args, **kwargs)
        assert not ran
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))


def test_a_forgotten_loss_fn():
    with pe.Pipeline(model(), 2, 2) as pipe:
        with pytest.raises(pe.InvalidArgument, match="give loss_fn= to Pipeline"):
            pipe.step(torch.randn(4, 4))
        assert pipe.eval(torch.randn(4, 4)).shape == (4, 4)


def test_what_was_not_measured_is_not_shown():
    with pe.Pipeline(model(), 2, 2, loss_fn=F.mse_loss) as pipe:
        for look in (lambda: pipe.trace, pipe.profile):
            with pytest.raises(pe.PipelineError, match="run a step first"):
                look()
        assert abs(pipe.simulate().bubble - 1 / 3) < 1e-12
    with pe.Pipeline(model(), 2, 2, loss_fn=F.mse_loss, trace=False) as pipe:
        pipe.step(torch.randn(4, 4), target=torch.randn(4, 4))
        with pytest.raises(pe.PipelineError, match="trace=False"):
            pipe.profile()


def test_costs_that_do_not_fit_the_plan():
    plan = pe.build_plan("1f1b", num_stages=3, microbatches=4)
    with pytest.raises(pe.InvalidSchedule, match="forward has 2 entries.*3 stages"):
        pe.simulate(plan, pe.Costs(forward=[1.0, 2.0]))
    with pytest.raises(pe.InvalidSchedule, match="latency has 3 entries.*2 boundaries"):
        pe.simulate(plan, pe.Costs(latency=[0.0, 0.0, 0.0]))
    with pytest.raises(pe.InvalidSchedule, match="not negative"):
        pe.simulate(plan, pe.Costs(backward=-1.0))


class Own(nn.Module):
    """Tied layers in a forward of its own."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4)])
        self.layers[2].weight = self.layers[0].weight

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize(
    "make", [Own, lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.Linear(4, 4))]
)
def test_a_pipeline_is_not_copied_and_its_model_is(make):
    trained, x = make(), torch.randn(8, 4)
    with pe.Pipeline(trained, 2, 4, loss_fn=F.mse_loss, sample=x) as pipe:
        pipe.step(x, target=torch.randn(8, 4))
        for copies in (copy.deepcopy, copy.copy, pickle.dumps):
            with pytest.raises(pe.PipelineError, match=r"AveragedModel\(model\) or copy.deepcopy\(model\)"):
                copies(pipe)
        trained.eval()
        averaged = AveragedModel(trained)
        averaged.update_parameters(trained)
        file = io.BytesIO()
        torch.save(trained, file)
        assert b"pipeline_ext" not in pickle.dumps(nn.ModuleList(trained.children()))
        file.seek(0)
        for other in (averaged, copy.deepcopy(trained), torch.load(file, weights_only=False)):
            assert torch.equal(other(x), trained(x))
