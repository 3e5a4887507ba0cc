"""The time of a stage as a function of a microbatch's tokens, fitted to measured steps."""

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import _C
from ..base import arguments
from ..base.texts import table
from ..errors import InvalidArgument
from .costs import Costs
from .profile import Profile, fastest, times_without_messages
from .records import TaskRecord

KINDS = ("F", "B", "I", "W")

# Which of linear, quadratic and constant are not 0. Of fits that are as close, the first counts.
_SUBSETS = [(2,), (0,), (1,), (0, 2), (1, 2), (0, 1), (0, 1, 2)]
_HEADER = ["stage", "", "measured", "fitted", "median error", "max error", "a token", "a pair", "constant"]
_AS_CLOSE = 1e-9  # relative difference of squared residuals
_ROUNDING = 1e-20  # of a squared residual, as a share of the squared times
_TOLD_APART = 1e-3  # the least of three scaled columns' singular values, as a share of the largest


class Measured(Protocol):
    """The trace of a step."""

    plan: _C.Plan

    @property
    def tasks(self) -> list[TaskRecord]: ...

    def profile(self) -> Profile: ...


class Size(NamedTuple):
    """How large a microbatch is: its tokens, and the sum of the squares of its rows' tokens."""

    tokens: int
    squares: int


@dataclass(frozen=True)
class StageFit:
    """The seconds of one kind of action at one stage: ``linear * tokens + quadratic * squares + constant``.

    Attributes:
        linear, quadratic, constant: none is negative.
        measured: the median of the measured seconds.
        fitted: the median of those that the fit gives for the same microbatches.
        median_error, max_error: of abs(fitted - measured) / measured over the microbatches.
    """

    linear: float
    quadratic: float
    constant: float
    measured: float
    fitted: float
    median_error: float
    max_error: float

    def cells(self) -> list[str]:
        """For the table."""
        return [
            *(f"{seconds * 1e3:.3f} ms" for seconds in (self.measured, self.fitted)),
            *(f"{error:.1%}" for error in (self.median_error, self.max_error)),
            *(f"{seconds:.3g} s" for seconds in (self.linear, self.quadratic, self.constant)),
        ]


@dataclass(frozen=True)
class FittedCosts:
    """What ``fit_costs`` found. ``str()`` makes a table of it: fitted beside measured times, by stage.

    Attributes:
        fits: by kind of action (``"F"``, ``"B"``, ``"I"``, ``"W"``), a fit for each stage; None if the stage
            did not run the kind. A fit has ``linear``, ``quadratic`` and ``constant`` (seconds of a token, of a
            pair of tokens in one row, and of a microbatch), ``measured`` and ``fitted`` (median seconds), and
            ``median_error`` and ``max_error`` (relative).
        profile: the least of each time in the measured steps, whose messages ``costs`` takes.
        steps: the number of measured steps.
        doubt: what the sizes of the microbatches do not tell; empty if nothing.
    """

    fits: dict[str, list[StageFit | None]]
    profile: Profile
    steps: int
    doubt: str = ""

    @property
    def linear(self) -> float:
        """Seconds of a token in ``F`` and the backward of all stages; for ``balanced_microbatches``."""
        return sum(self._terms(kind, stage)[0] for kind in "FB" for stage in self._stages)

    @property
    def quadratic(self) -> float:
        """The same of a pair of tokens in one row."""
        return sum(self._terms(kind, stage)[1] for kind in "FB" for stage in self._stages)

    def seconds(self, tokens: Sequence[Any]) -> list[list[list[float]]]:
        """Fitted seconds of ``F``, ``B``, ``I`` and ``W``, by stage and microbatch.

        ``tokens`` is one step's, as in ``fit_costs``; there may be any number of microbatches. As in ``Costs``,
        ``B`` is I + W where it was not measured, and ``I`` and ``W`` are half of ``B`` each. Raises
        InvalidArgument.
        """
        sizes = _sizes("tokens", tokens)
        if not sizes:
            raise InvalidArgument("tokens is empty; give the tokens of at least one microbatch")
        return [
            [[_seconds(self._terms(kind, stage), size) for kind in KINDS] for size in sizes]
            for stage in self._stages
        ]

    def costs(self, tokens: Sequence[Any]) -> Costs:
        """Costs of a step whose microbatches have these sizes, in seconds; messages as in ``profile``.

        By stage they are the mean over the microbatches, times the factors of each. Takes and raises what
        ``seconds`` does.
        """
        of_kind = [[statistics.fmean(column) for column in zip(*of_stage)] for of_stage in self.seconds(tokens)]
        forward, backward, input_grad, weight_grad = (list(column) for column in zip(*of_kind))
        return replace(
            self.profile.costs(),
            forward=forward,
            backward=backward,
            input_grad=input_grad,
            weight_grad=weight_grad,
            microbatch=self.factors(tokens),
        )

    def factors(self, tokens: Sequence[Any]) -> list[list[list[float]]]:
        """By stage and microbatch, what the times of ``F``, ``B``, ``I`` and ``W`` in ``costs`` are to be
        multiplied by to be those of the microbatch.

        Takes and raises what ``seconds`` does.
        """
        found = []
        for of_stage in self.seconds(tokens):
            means = [statistics.fmean(column) for column in zip(*of_stage)]
            found.append([[t / mean if mean else 1.0 for t, mean in zip(times, means)] for times in of_stage])
        return found

    def __str__(self) -> str:
        rows = [_HEADER]
        for stage, kind in itertools.product(self._stages, KINDS):
            fit = self.fits[kind][stage]
            if fit is not None:
                rows.append([str(stage), kind, *fit.cells()])
        of_steps = "1 step" if self.steps == 1 else f"{self.steps} steps"
        title = f"seconds of a microbatch, fitted to {of_steps}; measured, fitted: medians"
        return "\n".join([title, *table(rows, "><" + ">" * 7), *([self.doubt] if self.doubt else [])])

    @property
    def _stages(self) -> range:
        return range(len(self.fits["F"]))

    def _terms(self, kind: str, stage: int) -> list[float]:
        """Linear, quadratic and constant, of a kind that was not measured by way of the others."""
        fit = self.fits[kind][stage]
        if fit is not None:
            return [fit.linear, fit.quadratic, fit.constant]
        if kind == "B":
            return [i + w for i, w in zip(self._terms("I", stage), self._terms("W", stage))]
        return [term / 2 for term in self._terms("B", stage)]


def fit_costs(traces: Sequence[Measured], tokens: Sequence[Sequence[Any]]) -> FittedCosts:
    """Fits the time of each stage to the sizes of the microbatches that it ran.

    The seconds of ``F``, ``B``, ``I`` and ``W`` of a microbatch at a stage are taken to be

        linear * tokens + quadratic * sum of tokens**2 over its rows + constant,

    none of the three negative: those with the least squared error (nonnegative least squares, Lawson and
    Hanson, Solving Least Squares Problems, 1974; here by trying every set of terms). ``print`` the result: a
    table of fitted beside measured times, with the relative error.

    Args:
        traces: traces of steps, ``pipe.trace`` after each, or ``pipe.gather_trace()`` of many processes. Leave
            out the first steps, which are slower.
        tokens: for each trace, each microbatch's tokens: a number if it is one row (a packed sequence without
            boundaries), otherwise the tokens of each of its rows, a list or a tensor of one dimension. Rows
            that are padded have the tokens that they are padded to.

    Raises InvalidArgument if the numbers of traces, microbatches and stages do not match, for tokens that are
    no whole numbers of at least 0, and for a stage without measured ``F`` and backward.
    """
    _check_counts(traces, tokens)
    num_stages = traces[0].plan.num_stages
    samples: dict[tuple[str, int], list[tuple[Size, float]]] = {}
    for step, (trace, of_step) in enumerate(zip(traces, tokens)):
        sizes = _sizes(f"tokens[{step}]", of_step)
        count = trace.plan.num_microbatches
        if len(sizes) != count:
            raise InvalidArgument(
                f"tokens[{step}] has {len(sizes)} microbatches and the step of traces[{step}] had {count}"
            )
        if trace.plan.num_stages != num_stages:
            raise InvalidArgument(
                f"traces[{step}] has {trace.plan.num_stages} stages and traces[0] {num_stages}; give traces of "
                "one pipeline"
            )
        for task, seconds in times_without_messages(trace.plan, trace.tasks, trace.profile().overhead):
            if task.kind in KINDS:
                samples.setdefault((task.kind, task.stage), []).append(
                    (sizes[task.microbatch], max(0.0, seconds))
                )
    for stage in range(num_stages):
        kinds = {kind for kind in KINDS if (kind, stage) in samples}
        if not (kinds >= {"F", "B"} or kinds >= {"F", "I", "W"}):
            raise InvalidArgument(
                f"the traces have no times of stage {stage}; give traces of training steps, of many processes "
                "those of gather_trace()"
            )
    fits = {
        kind: [_fit(samples[kind, s]) if (kind, s) in samples else None for s in range(num_stages)]
        for kind in KINDS
    }
    doubt = _doubt([size for size, _ in samples["F", 0]])
    return FittedCosts(fits, fastest([trace.profile() for trace in traces]), len(traces), doubt)


def _check_counts(traces: Any, tokens: Any) -> None:
    """Raises InvalidArgument unless there are traces, and a list of tokens for each."""
    if not isinstance(traces, Sequence) or not traces:
        raise InvalidArgument("traces is no list of traces, or empty; give pipe.trace of one step or more")
    for step, trace in enumerate(traces):
        if not hasattr(trace, "tasks"):
            raise InvalidArgument(f"traces[{step}] is a {type(trace).__name__}; give pipe.trace after a step")
    if not isinstance(tokens, Sequence) or len(tokens) != len(traces):
        given = (
            f"has {len(tokens)} entries" if isinstance(tokens, Sequence) else f"is a {type(tokens).__name__}"
        )
        raise InvalidArgument(
            f"tokens {given} where there are {len(traces)} traces; give a list for each trace, with the tokens "
            "of its microbatches"
        )


def _sizes(name: str, tokens: Any) -> list[Size]:
    """The size of each microbatch of a step. Raises InvalidArgument."""
    found = tokens.tolist() if isinstance(tokens, Tensor) else tokens
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)):
        raise InvalidArgument(
            f"{name} is a {type(tokens).__name__}; give a list with an entry for each microbatch"
        )
    sizes = []
    for m, entry in enumerate(found):
        named = f"{name}[{m}]"
        one_row = not hasattr(entry, "__len__") or (isinstance(entry, Tensor) and entry.dim() == 0)
        rows = [arguments.size(named, entry)] if one_row else arguments.sizes(named, entry)
        sizes.append(Size(sum(rows), sum(row * row for row in rows)))
    return sizes


def _seconds(terms: Sequence[float], size: Size) -> float:
    linear, quadratic, constant = terms
    return linear * size.tokens + quadratic * size.squares + constant


def _columns(sizes: Sequence[Size]) -> tuple[Tensor, Tensor]:
    """Tokens, squares and ones, each over its largest value, and these values."""
    columns = torch.tensor([(*map(float, size), 1.0) for size in sizes], dtype=torch.float64)
    largest = columns.amax(0).clamp(min=1.0)
    return columns / largest, largest


def _fit(samples: Sequence[tuple[Size, float]]) -> StageFit:
    columns, scale = _columns([size for size, _ in samples])
    measured = torch.tensor([seconds for _, seconds in samples], dtype=torch.float64)
    least, terms = math.inf, torch.zeros(3, dtype=torch.float64)
    for subset in map(list, _SUBSETS):
        some = columns[:, subset]
        if int(torch.linalg.matrix_rank(some)) < len(subset):
            continue  # a smaller set fits as well
        found = torch.linalg.lstsq(some, measured[:, None]).solution[:, 0]
        residual = float((some @ found - measured).square().sum())
        if found.min() >= 0 and residual < least * (1 - _AS_CLOSE) - _ROUNDING * float(measured.square().sum()):
            least, terms = residual, torch.zeros(3, dtype=torch.float64)
            terms[subset] = found
    fitted = columns @ terms
    errors = ((fitted - measured).abs() / measured).nan_to_num(0.0).tolist()  # 0/0: nothing was measured
    linear, quadratic, constant = (terms / scale).tolist()
    return StageFit(
        linear,
        quadratic,
        constant,
        measured=statistics.median(measured.tolist()),
        fitted=statistics.median(fitted.tolist()),
        median_error=statistics.median(errors),
        max_error=max(errors),
    )


def _doubt(sizes: Sequence[Size]) -> str:
    """What cannot be told from microbatches of these sizes, in a sentence."""
    columns, _ = _columns(sizes)
    if int(torch.linalg.matrix_rank(columns, rtol=_TOLD_APART)) == 3:
        return ""
    if len(set(sizes)) == 1:
        return (
            "all microbatches are of one size, so time that grows with tokens cannot be told from time that "
            "does not: all is taken as constant"
        )
    return (
        "the microbatches' sizes are too alike to tell linear, quadratic and constant time apart: the fit "
        "holds for such sizes only"
    )
