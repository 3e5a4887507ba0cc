"""From a model and a sample to stages."""

import contextlib
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..base.imported import is_fully_sharded
from ..errors import InvalidArgument, PipelineError
from ..microbatches.cutting import Arguments
from ..model.cut import balanced, starts_of
from ..model.untouched import untouched
from ..stages.random_streams import RandomStreams
from .check import check
from .model_loss import found_loss, no_loss
from .on_meta import OnMeta
from .program import Program
from .recording import record
from .routing import compiled
from .stage import CallStage
from .timing import sizes, times
from .units import coarse_units, openable
from .values import copied

Agreed = Callable[[list[float]], list[float]]  # makes all processes take the same weights
_UNEVEN = 1.5  # the slowest stage, by the mean: beyond it units are opened


def cut_by_calls(
    model: nn.Module,
    num_stages: int | None,
    microbatches: Sequence[Arguments],
    *,
    cuts: Sequence[str | int] | None,
    balance: str | None,
    loss_fn: Callable[..., Tensor] | None,
    random: RandomStreams,
    agreed: Agreed = list,
) -> list[CallStage]:
    """The stages of a model that is cut by its own forward.

    Args:
        num_stages: may be left out with ``cuts``.
        microbatches: one or two of a sample, as arguments of the model.
        cuts: the units at which a stage begins, by name or position in the order of calls.
        balance: "time" or "parameters"; None: time, or parameters for a model on the meta device.
        loss_fn: None if the model computes its loss itself.
        random: the streams of the device that the model is on.
        agreed: makes all processes take the same weights.

    Raises:
        InvalidArgument: if the model cannot be cut, or not like this.
    """
    _check_model(model)
    on_meta = any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    meta = OnMeta(model) if on_meta else None
    if meta is not None:
        microbatches = [meta.arguments(arguments) for arguments in microbatches]
    opened = _opened_for(model, cuts)
    best: list[CallStage] | None = None
    while True:
        try:
            with untouched(model), _running(meta):
                args, kwargs = copied(microbatches[0])
                output = model(*args, **kwargs)  # may install what later forwards use
            if loss_fn is None and found_loss(output) is None:
                raise InvalidArgument(no_loss(output))
            del output
            with untouched(model), _running(meta):
                program = record(model, coarse_units(model, opened), microbatches[0])
            if cuts is not None:
                starts = starts_of(cuts, [call.name for call in program.calls], num_stages, "call")
                heavy = None
            else:
                starts, heavy = _balanced(program, num_stages, microbatches[0], balance, on_meta, agreed)
            stages = [CallStage(program, a, b) for a, b in zip(starts, [*starts[1:], len(program.calls)])]
            if len(starts) == (num_stages or len(starts)) and not on_meta:
                check(program, stages, microbatches, loss_fn, random)
        except PipelineError:
            if best is None:
                raise
            return best
        if len(starts) == (num_stages or len(starts)):
            best = stages
        if heavy is None:
            break
        opened = {*opened, heavy}
    if best is None:
        raise InvalidArgument(
            f"the model makes {len(program.calls)} calls that can be shared out, and cannot be cut into "
            f"{num_stages} stages; give num_stages of at most {len(program.calls)}"
        )
    return best


def _balanced(
    program: Program,
    num_stages: int | None,
    arguments: Arguments,
    balance: str | None,
    on_meta: bool,
    agreed: Agreed,
) -> tuple[list[int], nn.Module | None]:
    """Where stages begin, and a unit that could be opened for a better balance."""
    if num_stages is None:
        raise InvalidArgument("num_stages is missing: say into how many stages to cut the model")
    if balance not in (None, "time", "parameters"):
        raise InvalidArgument(f'balance is {balance!r}; it is "time" or "parameters"')
    if balance == "parameters" or on_meta:
        weights = sizes(program)
    else:
        with untouched(program.model):
            weights = times(program, arguments)
    weights = agreed(weights)
    parts = min(num_stages, len(program.calls))
    starts = balanced(weights, parts)
    of_stages = [sum(weights[a:b]) for a, b in zip(starts, [*starts[1:], len(weights)])]
    if parts == num_stages and max(of_stages) <= _UNEVEN * sum(weights) / num_stages:
        return starts, None
    slowest = of_stages.index(max(of_stages))
    ends = [*starts[1:], len(weights)]
    inside = range(len(weights)) if parts < num_stages else range(starts[slowest], ends[slowest])
    candidates = [n for n in inside if openable(program.calls[n].unit)]
    if not candidates:
        return starts, None
    return starts, program.calls[max(candidates, key=lambda n: weights[n])].unit


def _check_model(model: nn.Module) -> None:
    """Refuses a model whose code would not be run call by call, or whose hooks communicate."""
    units = coarse_units(model)
    inside = {module for unit in units for module in unit.modules()}
    for name, module in model.named_modules():
        if module not in inside and compiled(module):
            raise InvalidArgument(
                f"{name or 'the model'} is compiled as a whole, and cannot be cut inside; compile its layers, "
                f"as in {next(iter(units.values()))}.compile(), before or after they are given to Pipeline"
            )
    wrapped = next(
        (m for m in model.modules() if isinstance(m, DistributedDataParallel) or is_fully_sharded(m)), None
    )
    if wrapped is not None:
        raise InvalidArgument(
            f"the model has a {type(wrapped).__name__} inside, whose hooks would run in stages that do not "
            'hold it; leave it out, and give a mesh with a dimension "dp", over which Pipeline averages '
            "gradients; or give a list of stage modules that are wrapped"
        )
    if type(model).__name__ == "OptimizedModule":
        raise InvalidArgument(
            "the model is a result of torch.compile, and cannot be cut inside; give the model itself, and "
            "compile its layers with their compile()"
        )


def _running(meta: OnMeta | None) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext() if meta is None else meta.running()


def _opened_for(model: nn.Module, cuts: Sequence[str | int] | None) -> set[nn.Module]:
    """The units that must be opened because a cut lies inside them."""
    opened: set[nn.Module] = set()
    if cuts is None:
        return opened
    for cut_at in cuts if isinstance(cuts, (list, tuple)) else ():
        while isinstance(cut_at, str):
            units = coarse_units(model, opened)
            around = [u for u, name in units.items() if cut_at.startswith(f"{name}.")]
            if not around or not _has(around[0], cut_at.removeprefix(f"{units[around[0]]}.")):
                break
            opened.add(around[0])
    return opened


def _has(module: nn.Module, name: str) -> bool:
    return any(found == name for found, _ in module.named_modules())
