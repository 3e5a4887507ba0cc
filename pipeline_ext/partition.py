"""Cuts a model into stages, in the way that it allows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .calls.cutting import cut_by_calls
from .errors import InvalidArgument
from .microbatches.cutting import Arguments, Cutter, Whole
from .microbatches.rows import mark_inputs
from .model.containers import own_code
from .model.cut import cut as cut_layers

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
    microbatches = sample_microbatches(sample, Cutter(), 1)
    return [*cut_by_calls(model, num_stages, microbatches, cuts=cuts, balance=balance, loss_fn=loss_fn)]


def by_calls(model: Any) -> bool:
    """Whether a model is cut by its own forward."""
    return isinstance(model, nn.Module) and not isinstance(model, nn.ModuleList) and bool(own_code(model))


def sample_microbatches(
    sample: Any, cutter: Cutter, count: int, args_spec: Any = None, kwargs_spec: Any = None
) -> list[Arguments]:
    """The first two of a sample's ``count`` microbatches; the whole sample if it has fewer rows.

    Raises InvalidArgument for a sample that cannot be cut.
    """
    if sample is None:
        raise InvalidArgument(
            "a model with a forward of its own is cut by the calls that it makes; give a batch as sample=: a dict "
            "of the keyword inputs of step, or a tuple of the positional ones"
        )
    args: tuple = ()
    kwargs: dict[str, Any] = {}
    if isinstance(sample, Mapping):
        kwargs = dict(sample)
    elif isinstance(sample, tuple):
        args = sample
    else:
        args = (sample,)
    inputs = Whole(*mark_inputs(args, kwargs, args_spec, kwargs_spec))
    return cutter.cut_inputs(inputs, max(1, min(count, cutter.rows(inputs)))).parts[:2]
