"""Runs the stages on a sample, and compares with the model itself."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.tensors import same_values
from ..errors import InvalidArgument, PipelineError
from ..microbatches.cutting import Arguments
from ..model.untouched import untouched
from ..stages.random_streams import RandomStreams, StepStreams
from .gradients import gradients
from .model_loss import found_loss
from .plain import run_whole
from .program import Program
from .stage import CallStage
from .values import copied

Gradients = dict[Tensor, Tensor]
_SMALLEST = 1e-6
_LEAST = 0.05  # of the largest gradient of all
_ROUNDING = 64  # units in the last place by which sums of a gradient's parts may differ, of the largest element


def check(
    program: Program,
    stages: Sequence[CallStage],
    microbatches: Sequence[Arguments],
    loss_fn: Callable[..., Tensor] | None,
    random: RandomStreams,
) -> None:
    """Raises InvalidArgument unless the stages compute what the model does: output, loss and gradients.

    The microbatches run in turns, so that what is kept for one shows in another. ``random``: the streams of
    the device that the model is on.
    """
    streams = random.begin()
    expected = []
    with untouched(program.model):
        for m, arguments in enumerate(microbatches):
            with torch.enable_grad(), _drawing(streams, m):
                output = run_whole(program.model, program.units, copied(arguments))
                loss = _loss(output, loss_fn)
            expected.append((_detached(output), loss.detach(), _gradients([loss], program.model, None)))
            del output, loss
    with untouched(program.model):
        try:
            found = _run(program, stages, microbatches, loss_fn, streams)
        except PipelineError:
            raise
        except Exception as error:
            raise InvalidArgument(
                f"the model cannot be cut like this: a stage failed where the model itself did not, with "
                f"{type(error).__name__}: {error}; {_INSTEAD}"
            ) from error
    for (output, loss, grads), (their_output, their_loss, their_grads) in zip(expected, found):
        _compare_outputs(output, their_output)
        if not same_values(loss, their_loss):
            raise InvalidArgument(
                f"the stages give the loss {float(their_loss):.9g} where the model gives {float(loss):.9g}; "
                f"{_INSTEAD}"
            )
        _compare_gradients(program.model, grads, their_grads)


_INSTEAD = (
    "a value passes between layers in a way that cannot be followed; cut elsewhere (cuts=), or give a list of "
    "stage modules"
)


@contextlib.contextmanager
def _drawing(streams: StepStreams, m: int) -> Iterator[None]:
    with streams.in_this_thread():
        streams.enter(0, m)
        yield


def _run(
    program: Program,
    stages: Sequence[CallStage],
    microbatches: Sequence[Arguments],
    loss_fn: Callable[..., Tensor] | None,
    streams: StepStreams,
) -> list[tuple[Any, Tensor, Gradients]]:
    values: list[Any] = [copied(arguments) for arguments in microbatches]
    passed: list[list[tuple[list[Tensor], list[Tensor]]]] = [[] for _ in microbatches]  # received, sent
    with torch.enable_grad():
        for stage in stages:
            for m, value in enumerate(values):
                received: list[Tensor] = []
                if stage.begin > 0:
                    value, received = _entering(value)
                args, kwargs = value if stage.begin == 0 else ((value,), {})
                with _drawing(streams, m):
                    values[m] = stage(*args, **kwargs)
                    if stage.is_last:
                        values[m] = values[m], _loss(values[m], loss_fn)
                sent = values[m][1] if stage.is_last else values[m]
                passed[m].append((received, _requiring_grad(sent)))
    found = []
    for (output, loss), of_stages in zip(values, passed):
        total: Gradients = {}
        grads: list[Tensor | None] | None = None
        for received, sent in reversed(of_stages):
            of_stage, grads = _backward(sent, grads, program.model, received)
            for parameter, grad in of_stage.items():
                total[parameter] = total[parameter] + grad if parameter in total else grad
        found.append((_detached(output), loss.detach(), total))
    return found


def _loss(output: Any, loss_fn: Callable[..., Tensor] | None) -> Tensor:
    """The model's loss; where it needs a target, a sum over the output in its place."""
    loss = found_loss(output)
    if loss is None or loss_fn is not None:
        parts = [
            leaf.sum()
            for leaf in pytree.tree_leaves(output)
            if isinstance(leaf, Tensor) and leaf.requires_grad and not leaf.is_complex()
        ]
        loss = torch.stack([part.float() for part in parts]).sum() if parts else torch.zeros(())
    return loss


def _entering(value: Any) -> tuple[Any, list[Tensor]]:
    entered: dict[int, Tensor] = {}

    def one(tensor: Tensor) -> Tensor:
        if id(tensor) not in entered:
            entered[id(tensor)] = tensor.detach().requires_grad_(tensor.requires_grad)
        leaf = entered[id(tensor)]
        return leaf.clone() if leaf.requires_grad else leaf  # the stage may write to it

    value = pytree.tree_map_only(Tensor, one, value)
    return value, [leaf for leaf in entered.values() if leaf.requires_grad]


def _requiring_grad(value: Any) -> list[Tensor]:
    tensors = (t for t in pytree.tree_leaves(value) if isinstance(t, Tensor) and t.requires_grad)
    return list({id(t): t for t in tensors}.values())


def _gradients(outputs: list[Tensor], model: nn.Module, grads: Any) -> Gradients:
    return _backward(outputs, grads, model, [])[0]


def _backward(
    outputs: list[Tensor], grads: Sequence[Tensor | None] | None, model: nn.Module, received: list[Tensor]
) -> tuple[Gradients, list[Tensor | None]]:
    """The gradients of parameters, and of what was received."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    given = [*map(torch.ones_like, outputs)] if grads is None else grads
    pairs = [(t, g) for t, g in zip(outputs, given) if g is not None and t.requires_grad]
    if not pairs:
        return {}, [None] * len(received)
    found = gradients([t for t, _ in pairs], [g for _, g in pairs], [*received, *parameters])
    of_parameters = zip(parameters, found[len(received) :])
    return {p: g for p, g in of_parameters if g is not None}, list(found[: len(received)])


def _detached(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, Tensor.detach, value)


def _compare_outputs(expected: Any, found: Any) -> None:
    ours = dict(pytree.tree_flatten_with_path(found)[0])
    for path, leaf in pytree.tree_flatten_with_path(expected)[0]:
        if isinstance(leaf, Tensor):
            other = ours.get(path)
            if not isinstance(other, Tensor) or not same_values(leaf, other):
                raise InvalidArgument(
                    f"the stages give another output{pytree.keystr(path)} than the model itself; {_INSTEAD}"
                )


def _compare_gradients(model: nn.Module, expected: Gradients, found: Gradients) -> None:
    # A gradient that is zero but for rounding, as a bias's before batch norm, has no scale of its own.
    least = _LEAST * max((float(g.abs().max()) for g in expected.values() if g.numel()), default=0.0)
    for name, parameter in model.named_parameters():
        a, b = expected.get(parameter), found.get(parameter)
        if a is None and b is None:
            continue
        difference = float("inf")
        if a is not None and b is not None:
            a, b = (t.to_dense() if t.layout is not torch.strided else t for t in (a, b))
            if same_values(a, b):
                continue
            scale = max(float(a.abs().max()), least, _SMALLEST)
            difference = float((a - b).abs().max()) / scale
            if difference <= _ROUNDING * torch.finfo(a.dtype).eps:
                continue
        raise InvalidArgument(
            f"the stages give {name} another gradient than the model itself (relative difference "
            f"{difference:.1e}); {_INSTEAD}"
        )
