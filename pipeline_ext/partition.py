"""Cuts a model into stages, in the way that it allows."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .calls.cutting import cut_by_calls
from .engines.choice import streams_of_model
from .errors import InvalidArgument
from .microbatches.cutting import Arguments, Cutter, Presplit
from .microbatches.doubt import Trial
from .model.containers import is_list_of_stages, own_code
from .model.cut import cut as cut_layers
from .settings import Settings

__all__ = ["cut"]

Stages = list[nn.Module | Callable[[], nn.Module]]


def cut(
    model: nn.Module | Sequence[nn.Module],
    num_stages: int | None,
    *,
    cuts: Sequence[str | int] | None = None,
    balance: str | None = None,
    sample: Any = None,
    loss_fn: Callable[..., Tensor] | None = None,
) -> Stages:
    """The stage modules of a model.

    An ``nn.Sequential`` that does nothing but run its layers is cut between layers. Any other module is cut by
    its own forward: every stage runs it, and computes only its share of the calls of units. Units are the
    members of an nn.ModuleList, nn.Sequential or nn.ModuleDict, and modules without such inside.

    Args:
        model: a module; or a list of stage modules, or of functions that make them.
        num_stages: number of stages; may be left out if ``model`` or ``cuts`` tell it.
        cuts: the layers, or units in the order of their calls, at which a new stage begins: names or positions.
        balance: ``"parameters"``: the largest stage has as few parameters as possible. ``"time"``: the slowest
            stage takes as little time as possible for forward and backward of ``sample``, which is measured.
            None: parameters of layers, times of units.
        sample: a batch: a dict of keyword inputs, a tuple of positional ones, or one value. Needed for a model
            that is cut by its own forward, and for ``balance="time"``.
        loss_fn: None if the model computes its loss itself.

    Raises:
        InvalidArgument: if the model cannot be cut like this. The message says how it can.
    """
    if not by_calls(model):
        return cut_layers(model, num_stages, cuts=cuts, balance=balance or "parameters", sample=sample)
    assert isinstance(model, nn.Module)
    microbatches = [_arguments(sample)]
    stages = cut_by_calls(
        model,
        num_stages,
        microbatches,
        cuts=cuts,
        balance=balance,
        loss_fn=loss_fn,
        random=streams_of_model(model),
    )
    return [*stages]


def by_calls(model: Any) -> bool:
    """Whether a model is cut by its own forward."""
    return isinstance(model, nn.Module) and not is_list_of_stages(model) and bool(own_code(model))


def sample_microbatches(settings: Settings) -> list[Arguments]:
    """The first two microbatches of a pipeline's sample. Raises InvalidArgument for one that cannot be cut."""
    return given_sample(settings, *_arguments(settings.sample), None, None)


def given_sample(
    settings: Settings, args: tuple, kwargs: dict[str, Any], arg_mbs: Any, kwarg_mbs: Any
) -> list[Arguments]:
    """The first two microbatches of a batch, given as to ``step``; the whole batch if it has fewer rows."""
    model = settings.model
    assert isinstance(model, nn.Module)

    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    trial = None if on_meta else Trial.of(model, is_whole=True)
    cutter = Cutter(settings.batch_dim or 0, settings.args_spec, settings.kwargs_spec, trial=trial)
    counts = range(1, settings.microbatches + 1)
    inputs = cutter.given_inputs(args, kwargs, arg_mbs, kwarg_mbs, counts)
    if isinstance(inputs, Presplit):
        return inputs.parts[:2]
    return cutter.cut_inputs(inputs, max(1, min(settings.microbatches, cutter.rows(inputs)))).parts[:2]


def takes_by_name(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether a model's forward takes these inputs as keywords."""
    try:
        inspect.signature(model.forward).bind(**inputs)
    except (TypeError, ValueError):
        return False
    return True


def _arguments(sample: Any) -> Arguments:
    if sample is None:
        raise InvalidArgument(
            "a model with a forward of its own is cut by the calls that it makes; give a batch as sample=: a "
            "dict of the keyword inputs of step, or a tuple of the positional ones"
        )
    if isinstance(sample, Mapping):
        return (), dict(sample)
    return (sample if isinstance(sample, tuple) else (sample,)), {}
