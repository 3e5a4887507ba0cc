"""Runs a step of a pipeline beside the unsplit model in plain autograd, and says why they differ."""

import contextlib
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from ..base.undone import undone
from ..calls.plain import run_whole
from ..calls.program import Program
from ..microbatches.cutting import Arguments, Cutter, Presplit, Whole, input_name
from ..microbatches.joining import join
from ..microbatches.rows import Marked, unmarked, whole
from ..model.slice import Slice
from ..model.untouched import untouched
from ..report.verification import Difference, Verification, with_roundings
from ..stages.modes import evaluation_mode
from ..stages.random_streams import NoStreams, StepStreams
from ..stages.split_backward import run_backward
from ..stages.stage import WithLoss
from .batch import Batch
from .stepper import Stepper

Gradients = dict[str, Tensor | None]
_CLOSE = 1e-4
_LEAST = 1e-2  # of the largest gradient of all


@dataclass(frozen=True)
class Unsplit:
    """The model as plain autograd runs it.

    Attributes:
        model: what the pipeline was made of, if that is one module; None for a list of stages.
        stages: the modules of all stages, in order.
        loss_fn, stage_loss: as ``Pipeline`` has them; without ``loss_fn`` there are no losses.
        program: the calls of a model that is cut by its own forward.
    """

    model: nn.Module | None
    stages: Mapping[int, nn.Module]
    loss_fn: Callable[..., Tensor] | None
    stage_loss: Callable[[nn.Module], Tensor] | None
    program: Program | None = None

    def output(self, arguments: Arguments) -> Any:
        """The output for one microbatch or a whole batch, and the losses that stages add."""
        return self._forward(arguments, [])

    def losses(self, arguments: Arguments, target: Any, streams: StepStreams, m: int) -> list[Tensor]:
        """The loss of one microbatch or a whole batch, and what stages add."""
        added: list[Tensor] = []
        with self._drawing(streams, m):
            output = self._forward(arguments, added)
            if self.stage_loss is not None:
                added += [self.stage_loss(stage) for stage in self.stages.values()]
            assert self.loss_fn is not None  # verify needs it
            loss = self.loss_fn(output) if target is None else self.loss_fn(output, target)
        return [loss, *added]

    def _forward(self, arguments: Arguments, added: list[Tensor]) -> Any:
        args, kwargs = arguments
        if self.program is not None:
            return run_whole(self.program.model, self.program.units, arguments)
        value: Any = None
        # An nn.Sequential takes one argument, its first layer in a stage any.
        modules = self.stages
        if self.model is not None and len(args) == 1 and not kwargs:
            modules = {0: self.model}
        for index, module in modules.items():
            value = module(*args, **kwargs) if index == 0 else module(value)
            if isinstance(value, WithLoss):
                added.append(value.loss)
                value = value.value
        return value

    @contextlib.contextmanager
    def _drawing(self, streams: StepStreams, m: int) -> Iterator[None]:
        """Inside it, each stage's layers draw from the stage's own stream."""
        firsts = {
            index: next(iter(stage.layers)) if isinstance(stage, Slice) else stage
            for index, stage in self.stages.items()
        }
        before = [(first._forward_pre_hooks, set(first._forward_pre_hooks)) for first in firsts.values()]

        def put_back() -> None:
            for hooks, own in before:
                for number in set(hooks) - own:
                    del hooks[number]

        with undone(put_back):
            for index, first in firsts.items():

                def begin(*_: Any, index: int = index) -> None:
                    streams.enter(index, m)

                first.register_forward_pre_hook(begin)
            streams.enter(0, m)
            yield


def verify(
    unsplit: Unsplit,
    stepper: Stepper,
    inputs: Whole | Presplit,
    target: Any,
    named_parameters: Mapping[str, nn.Parameter],
    labels: Any = None,
    replays: bool = False,
) -> Verification:
    """Compares one step. The model, its gradients and the random state are as before when it returns.

    ``replays``: other steps may be replays of a graph.

    Raises as ``Pipeline.step`` does.
    """
    check = _Comparison(unsplit, stepper, named_parameters)
    try:
        return _compared(check, unsplit, stepper, inputs, target, named_parameters, labels, replays)
    except BaseException:
        check.end()
        raise


def _compared(
    check: "_Comparison",
    unsplit: Unsplit,
    stepper: Stepper,
    inputs: Whole | Presplit,
    target: Any,
    named_parameters: Mapping[str, nn.Parameter],
    labels: Any,
    replays: bool,
) -> Verification:
    count = stepper.microbatches
    cut = stepper.cutter.cut_inputs(inputs, count)
    rows = sum(cut.lengths)
    targets = stepper.cutter.cut_target(target, rows, count)
    counted = targets or stepper.cutter.cut_target(labels, rows, count)
    weights = stepper.weights_of(cut.lengths, counted)
    with check.untouched():
        batch = Batch(inputs, target, keep_outputs=False, keep_losses=False, record=False, labels=labels)
        pipelined, found = check.gradients_of(lambda: stepper.train(batch, applies=False).loss)
    streams = stepper.random.begin()
    with check.untouched(), streams.in_this_thread():
        plain, expected = check.gradients_of(
            lambda: _microbatched(unsplit, cut.parts, targets, weights, streams)
        )
        draws = bool(streams.drew)
    loss_whole: Tensor | None = None
    reasons: list[str] = []
    at_once: Gradients | None = None
    if draws and replays:
        reasons.append(
            "the step was compared without its graph: a replay draws other random numbers, from the GPU's own "
            "generator"
        )
    if draws:
        reasons.append(
            "the whole batch was not compared: the model draws random numbers, other ones for a whole batch"
        )
    elif isinstance(inputs, Presplit) or isinstance(target, Presplit):
        reasons.append("the whole batch was not compared: the microbatches were given one by one")
    else:
        with check.untouched():
            loss_whole, at_once = check.gradients_of(lambda: _whole(unsplit, inputs, target))
    # A gradient that is zero but for rounding, as a bias's before batch norm, has no scale of its own.
    least = _LEAST * max((float(g.abs().max()) for g in expected.values() if g is not None), default=0.0)
    parameters = [
        Difference(
            name,
            _difference(found[name], expected[name], least),
            None if at_once is None else _difference(found[name], at_once[name], least),
        )
        for name in named_parameters
    ]
    report = Verification(
        float(pipelined),
        float(plain),
        None if loss_whole is None else float(loss_whole),
        parameters,
        epsilon=_epsilon(expected.values()),
    )
    if not report.ok:
        with check.untouched():
            reasons += _reasons(unsplit, stepper.cutter, count, inputs, target, report)
    return replace(report, reasons=reasons)


class _Comparison:
    """Runs steps without leaving a trace in the model."""

    def __init__(
        self, unsplit: Unsplit, stepper: Stepper, named_parameters: Mapping[str, nn.Parameter]
    ) -> None:
        self._stepper = stepper
        self._parameters = named_parameters
        of_loss = [unsplit.loss_fn] if isinstance(unsplit.loss_fn, nn.Module) else []
        self._modules = [*unsplit.stages.values(), *of_loss]

    @contextlib.contextmanager
    def untouched(self) -> Iterator[None]:
        """Puts gradients, buffers and the random state back. Hooks that apply gradients do not run."""
        trace = self._stepper.trace
        try:
            self._stepper.hooks.hold()
            with untouched(*self._modules):
                yield
        finally:
            self._stepper.trace = trace
            self.end()

    def end(self) -> None:
        """Undoes what a comparison that Ctrl-C has ended may have left. May be called again."""
        self._stepper.hooks.put_back()

    def gradients_of(self, step: Callable[[], Tensor]) -> tuple[Tensor, Gradients]:
        """The loss of a step, and what it left in ``.grad``."""
        loss = step()
        return loss.detach(), {
            name: None if p.grad is None else p.grad.detach().clone() for name, p in self._parameters.items()
        }


def _microbatched(
    unsplit: Unsplit,
    parts: Sequence[Arguments],
    targets: Sequence[Any] | None,
    weights: Sequence[tuple[float, float]],
    streams: StepStreams,
) -> Tensor:
    total: Tensor | None = None
    for m, (arguments, (weight, weight_of_added)) in enumerate(zip(parts, weights, strict=True)):
        loss, *added = unsplit.losses(arguments, None if targets is None else targets[m], streams, m)
        terms = [(loss, weight), *((of_stage, weight_of_added) for of_stage in added)]
        counted = [term * w for term, w in terms if w != 0]
        if counted:
            of_microbatch = functools.reduce(operator.add, counted)
            streams.enter(0, m, backward=True)
            run_backward([of_microbatch], [torch.ones_like(of_microbatch)])
            total = of_microbatch.detach() if total is None else total + of_microbatch.detach()
    assert total is not None  # something counts, or the step would have been refused
    return total


def _whole(unsplit: Unsplit, inputs: Whole, target: Any) -> Tensor:
    losses = unsplit.losses(unmarked((inputs.args, inputs.kwargs)), unmarked(target), NoStreams(), 0)
    loss = functools.reduce(operator.add, losses)
    loss.backward()
    return loss


def _epsilon(gradients: Iterable[Tensor | None]) -> float:
    """The relative step of the coarsest floating type in which the model computes."""
    types = {grad.dtype for grad in gradients if grad is not None and grad.is_floating_point()}
    types |= {torch.get_autocast_dtype(d) for d in ("cpu", "cuda") if torch.is_autocast_enabled(d)}
    return max((torch.finfo(dtype).eps for dtype in types), default=torch.finfo(torch.float32).eps)


def _difference(found: Tensor | None, expected: Tensor | None, least: float) -> float:
    if found is None or expected is None:
        return 0.0 if found is expected else float("inf")
    found, expected = (t.to_dense() if t.is_sparse else t for t in (found, expected))
    if torch.equal(found, expected):
        return 0.0
    scale = max(float(expected.abs().max()), least)
    difference = float((found - expected).abs().max()) / (scale or 1.0)
    return difference if difference == difference else float("inf")


def _reasons(
    unsplit: Unsplit, cutter: Cutter, count: int, inputs: Whole | Presplit, target: Any, report: Verification
) -> list[str]:
    """What the differences are due to, in words, as far as a few runs forward tell."""
    found = []
    close = with_roundings(_CLOSE, report.epsilon)
    if report.worst_microbatched >= close:
        if abs(report.loss - report.loss_microbatched) <= close * abs(report.loss_microbatched):
            found.append(
                "the losses are equal and the gradients are not: a term of the loss has no gradient here"
            )
        else:
            found.append("code of the model does not run in its stages, or runs differently")
        missing = [p.name for p in report.parameters if p.microbatched == float("inf")]
        if missing:
            found.append(
                f"with a gradient on one side only, or one that is not finite: {', '.join(missing[:5])}"
            )
    if report.loss_whole is None or not isinstance(inputs, Whole) or (report.worst_whole or 0) < close:
        return found
    layers = [m for stage in unsplit.stages.values() for m in stage.modules()]
    if any(isinstance(m, _BatchNorm) and m.training for m in layers):
        found.append("batch norm in training mode: its statistics are those of a microbatch")
    with evaluation_mode(unsplit.stages.values()):
        found += _input_reasons(unsplit, cutter, count, inputs, close)
        if not found and unsplit.stage_loss is not None:
            found.append("what stage_loss adds is computed from a microbatch, not from the whole batch")
        if not found:
            found.append(
                "the outputs of the microbatches are those of the whole batch, and the loss is not: it is no "
                "mean over rows. If it leaves labels out, give loss_weight=, as pipeline_ext.count_not(-100); "
                'if it sums, give loss_reduction="sum"'
            )
    return found


def _input_reasons(unsplit: Unsplit, cutter: Cutter, count: int, inputs: Whole, close: float) -> list[str]:
    expected = _output(unsplit, unmarked((inputs.args, inputs.kwargs)))

    def agrees(cut_by: Cutter, given: Whole) -> bool:
        try:
            parts = [_output(unsplit, part) for part in cut_by.cut_inputs(given, count).parts]
            return _same(join(parts, cut_by.batch_dim), expected, close)
        except Exception:
            return False

    if agrees(cutter, inputs):
        return []
    pair = (inputs.args, inputs.kwargs)
    flat, spec = pytree.tree_flatten_with_path(pair, is_leaf=lambda v: isinstance(v, Marked))
    for index, (path, leaf) in enumerate(flat):
        leaves = [whole(v) if i == index else v for i, (_, v) in enumerate(flat)]
        if isinstance(leaf, Tensor) and agrees(cutter, Whole(*pytree.tree_unflatten(leaves, spec))):
            return [
                f"{input_name(path)}, of shape {list(leaf.shape)}, was cut into microbatches, but the model "
                "wants all of it: give pipeline_ext.whole(...)"
            ]
    for dim in (0, 1):
        if dim != cutter.batch_dim and agrees(Cutter(dim), inputs):
            return [
                f"the batch is cut along dimension {cutter.batch_dim}, but lies in dimension {dim} of the "
                f"inputs: give batch_dim={dim} to Pipeline"
            ]
    return [
        "the outputs of a sample depend on the other samples of its batch: an input is cut wrongly, or a layer "
        "mixes rows"
    ]


def _output(unsplit: Unsplit, arguments: Arguments) -> Any:
    with torch.no_grad():
        return unsplit.output(arguments)


def _same(found: Any, expected: Any, close: float) -> bool:
    a, b = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    return len(a) == len(b) and all(
        not isinstance(x, Tensor)
        or (isinstance(y, Tensor) and x.shape == y.shape and torch.allclose(x, y, close, close))
        for x, y in zip(a, b)
    )
