"""What ``Pipeline.verify`` found: a step of the pipeline beside plain autograd."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..base.texts import table

_ROUNDING = 1e-5  # relative, of a gradient: what another order of sums may change
_WHOLE = 1e-3  # the same where every operator has other shapes
_STEPS = 8  # that many roundings of a coarser type
_SHOWN = 8  # parameters in the table


def with_roundings(tolerance: float, epsilon: float) -> float:
    """A relative tolerance of float32, widened where the model computes in a type with this step."""
    return max(tolerance, _STEPS * epsilon)


@dataclass(frozen=True)
class Difference:
    """How far one parameter's gradient is from plain autograd's.

    Attributes:
        name: the parameter's, in the unsplit model.
        microbatched: the largest difference over the largest gradient, to the same microbatches in plain
            autograd; 0.0 for equal bits, infinite if only one of them has a gradient, or one is not finite.
        whole: the same to the whole batch at once; None if that was not compared.
    """

    name: str
    microbatched: float
    whole: float | None


@dataclass(frozen=True)
class Verification:
    """A step of a pipeline beside the unsplit model in plain autograd. ``str`` makes a table of it.

    Attributes:
        loss, loss_microbatched, loss_whole: the pipeline's, and those of plain autograd; ``loss_whole`` is None
            if the whole batch was not compared.
        parameters: the differences by parameter.
        reasons: what the differences are due to, in words; and why the whole batch was not compared.
        epsilon: the relative step of the coarsest floating type in which the model computes.
    """

    loss: float
    loss_microbatched: float
    loss_whole: float | None
    parameters: Sequence[Difference]
    reasons: Sequence[str] = field(default=())
    epsilon: float = 2.0**-23

    @property
    def worst_microbatched(self) -> float:
        """The largest difference to the same microbatches."""
        return max((p.microbatched for p in self.parameters), default=0.0)

    @property
    def worst_whole(self) -> float | None:
        """The largest difference to the whole batch at once."""
        found = [p.whole for p in self.parameters if p.whole is not None]
        return max(found) if found else None

    @property
    def bit_for_bit(self) -> bool:
        """Whether loss and gradients have the bits of plain autograd over the same microbatches."""
        return self.loss == self.loss_microbatched and self.worst_microbatched == 0

    @property
    def ok(self) -> bool:
        """Whether both equal plain autograd but for rounding, over the microbatches and the whole batch."""
        whole = self.worst_whole
        return self.worst_microbatched < self._rounding and (whole is None or whole < self._rounding_of_whole)

    @property
    def _rounding(self) -> float:
        return with_roundings(_ROUNDING, self.epsilon)

    @property
    def _rounding_of_whole(self) -> float:
        return with_roundings(_WHOLE, self.epsilon)

    def __str__(self) -> str:
        header = ("", "pipeline", "same microbatches", "whole batch")
        rows = [
            ("loss", f"{self.loss:.6f}", f"{self.loss_microbatched:.6f}", _number(self.loss_whole)),
            ("worst gradient", "", _relative(self.worst_microbatched), _relative(self.worst_whole)),
        ]
        off = sorted(self.parameters, key=lambda p: (p.microbatched, p.whole or 0), reverse=True)
        off = [p for p in off if p.microbatched > 0 or (p.whole or 0) > self._rounding_of_whole]
        rows += [(f"  {p.name}", "", _relative(p.microbatched), _relative(p.whole)) for p in off[:_SHOWN]]
        lines = table([header, *rows])
        if len(off) > _SHOWN:
            lines.append(f"  and {len(off) - _SHOWN} more parameters")
        return "\n".join([*lines, *self.reasons, self.summary()])

    def summary(self) -> str:
        """One sentence."""
        if self.bit_for_bit:
            same = "equal plain autograd over the same microbatches bit for bit"
        elif self.worst_microbatched < self._rounding:
            same = "equal plain autograd over the same microbatches within rounding"
        else:
            same = f"DIFFER from plain autograd over the same microbatches by {self.worst_microbatched:.1e}"
        whole = self.worst_whole
        if whole is None:
            return f"loss and gradients {same}"
        return f"loss and gradients {same}; from the whole batch at once they are {whole:.1e} away"


def _number(value: float | None) -> str:
    return "not compared" if value is None else f"{value:.6f}"


def _relative(value: float | None) -> str:
    if value is None:
        return "not compared"
    return "equal bits" if value == 0 else f"{value:.1e}"
