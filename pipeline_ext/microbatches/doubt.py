"""Whether an input has as many rows as the batch, or has them by chance: the model is asked.

A causal mask [S, S], or positions [S], of a batch of S samples look like rows. A part of them does not fit the
model then, and the whole does.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..base.tensors import same_values
from ..errors import InvalidArgument
from ..model.untouched import untouched

Arguments = tuple[tuple, dict[str, Any]]
PartWith = Callable[[Collection[str]], Arguments]


class Trial(NamedTuple):
    """What can be tried before the first step.

    Attributes:
        modules: what runs; it is as before afterwards.
        output: of these modules, for the arguments of one microbatch.
        is_whole: whether they are all of the model, not its first stage alone.
    """

    modules: Collection[nn.Module]
    output: Callable[[Arguments], Any]
    is_whole: bool

    @classmethod
    def of(cls, module: nn.Module, is_whole: bool) -> "Trial":
        """Of one module, called with the arguments."""
        return cls([module], lambda arguments: module(*arguments[0], **arguments[1]), is_whole)


@dataclass(frozen=True)
class Doubts:
    """The inputs, by name, that may have as many rows as the batch by chance.

    Attributes:
        doubtful: square, or of one dimension.
        others: that are doubted only if the model fails with their rows.
    """

    doubtful: Mapping[str, Tensor]
    others: Mapping[str, Tensor]

    @classmethod
    def about(
        cls, inputs: Mapping[str, Tensor], known: Collection[str], first: str, has_single_rows: bool
    ) -> "Doubts":
        """The doubts about what is cut.

        Args:
            known: an input that had rows before, as a mask [B, S] of another step, is not doubted.
            first: the input that says how many rows the batch has.
            has_single_rows: whether a microbatch is one row. A row of any table [S, D] broadcasts.
        """
        odd = {name for name, t in inputs.items() if t.dim() == 1 or t.shape[0] == t.shape[1]}
        doubtful = set() if all(t.dim() == 1 for t in inputs.values()) else odd - {first}
        others = {name for name in inputs if name != first} if has_single_rows else set()
        if first in odd:
            others.add(first)
        return cls(
            {name: tensor for name, tensor in inputs.items() if name in doubtful - set(known)},
            {name: tensor for name, tensor in inputs.items() if name in others - doubtful - set(known)},
        )

    def __bool__(self) -> bool:
        return bool(self.doubtful or self.others)

    def settle(self, part_with: PartWith, trial: Trial, remedy: str) -> set[str]:
        """The inputs that are still doubtful.

        Args:
            part_with: the arguments of a microbatch, with these inputs whole.
            remedy: what to say in an error.

        Raises:
            InvalidArgument: the model takes an input whole, or in both ways, with different results.
        """
        cut = _tried(trial, part_with(()))
        if isinstance(cut, Exception):
            every = {**self.doubtful, **self.others}
            for names in (*([name] for name in every), list(self.doubtful), list(every)):
                if names and not isinstance(_tried(trial, part_with(names)), Exception):
                    raise InvalidArgument(
                        f"{_described(every, names)} as many rows as the batch by chance: the model takes all "
                        f"of it, and fails with a microbatch's part ({type(cut).__name__}: {cut}); {remedy}"
                    )
            return set(self.doubtful)  # something else is wrong, which the step will say
        remaining = set()
        for name in self.doubtful:
            whole = _tried(trial, part_with([name]))
            if isinstance(whole, Exception) or _same(cut, whole):
                continue
            if trial.is_whole:
                raise InvalidArgument(
                    f"{_described(self.doubtful, [name])} as many rows as the batch, perhaps by chance: the "
                    "model takes all of it as well as a microbatch's part, and returns something else; "
                    f"{remedy}"
                )
            remaining.add(name)
        return remaining


def _described(doubtful: Mapping[str, Tensor], names: Collection[str]) -> str:
    listed = " and ".join(f"{name}, of shape {list(doubtful[name].shape)}," for name in names)
    return f"{listed} {'have' if len(names) > 1 else 'has'}"


def _tried(trial: Trial, arguments: Arguments) -> Any:
    """The output, or the exception."""
    try:
        with untouched(*trial.modules), torch.no_grad():
            # A model may write to its inputs.
            return trial.output(pytree.tree_map_only(Tensor, torch.clone, arguments))
    except Exception as error:
        return error


def _same(found: Any, expected: Any) -> bool:
    a, b = pytree.tree_leaves(found), pytree.tree_leaves(expected)
    return len(a) == len(b) and all(map(_same_leaf, a, b))


def _same_leaf(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return same_values(a, b)
    return type(a) is type(b)
