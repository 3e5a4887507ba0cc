"""Cutting a batch into microbatches."""

import itertools
import warnings
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument
from .doubt import Doubts, Trial
from .kinds import block_mask_rows, cut_block_mask, cut_nested, is_block_mask
from .opaque import held_tensors, how_to_open
from .rows import Marked, Rows, mark, mark_inputs

Arguments = tuple[tuple, dict[str, Any]]


def _say(rows: str = "...", entry: str = "row") -> str:
    return (
        f"say pipeline_ext.rows({rows}) if it has one {entry} for each sample, or pipeline_ext.whole(...) if "
        "every microbatch takes all of it (or args_spec=, kwargs_spec=, target_spec= of Pipeline)"
    )


class Whole(NamedTuple):
    """The inputs of a whole batch, marked where the caller said how they are cut."""

    args: tuple
    kwargs: dict[str, Any]


class Presplit(NamedTuple):
    """Inputs or targets that the caller has cut, by microbatch."""

    parts: list[Any]


class Cut(NamedTuple):
    """A batch's inputs by microbatch, and the rows of each."""

    parts: list[Arguments]
    lengths: list[int]


class Cutter:
    """Cuts the batches of one pipeline.

    A tensor that is not marked has a row for each sample along ``batch_dim``. So does a nested tensor, and a
    FlexAttention BlockMask unless it broadcasts, along dimension 0. Tensors without dimensions, and values
    without tensors, go to every microbatch unchanged. The parts of a tensor share its memory, but each has its
    own version counter: changing one in place does not invalidate what the backward of another saved.
    """

    def __init__(
        self,
        batch_dim: int = 0,
        args_spec: Any = None,
        kwargs_spec: Any = None,
        target_spec: Any = None,
        trial: Trial | None = None,
    ) -> None:
        """The specs are results of ``rows.check_spec``; ``trial`` settles doubts, of which it warns else."""
        self.batch_dim = batch_dim
        self._specs = args_spec, kwargs_spec
        self._target_spec = target_spec
        self._trial = trial
        self._known: set[str] = set()  # inputs that have rows, or of which it was warned

    def given_inputs(
        self,
        args: tuple,
        kwargs: dict[str, Any],
        arg_mbs: Iterable[Any] | None,
        kwarg_mbs: Iterable[Any] | None,
        counts: Sequence[int],
    ) -> Whole | Presplit:
        """The inputs of a call: a whole batch, or its microbatches, whose number is one of ``counts``.

        Raises InvalidArgument if both are given, or the microbatches are not as many.
        """
        if arg_mbs is None and kwarg_mbs is None:
            return Whole(*mark_inputs(args, kwargs, *self._specs))
        if args or kwargs:
            raise InvalidArgument(
                "a whole batch and microbatches (arg_mbs, kwarg_mbs) are both given; give one of them"
            )
        found = {
            name: _listed(name, of_each, counts)
            for name, of_each in (("arg_mbs", arg_mbs), ("kwarg_mbs", kwarg_mbs))
            if of_each is not None
        }
        sizes = {len(of_each) for of_each in found.values()}
        if len(sizes) > 1:
            raise InvalidArgument(
                f"arg_mbs has {len(found['arg_mbs'])} microbatches and kwarg_mbs {len(found['kwarg_mbs'])}"
            )
        count = sizes.pop()
        arg_parts = [_as_args(m, args) for m, args in enumerate(found.get("arg_mbs", [()] * count))]
        kwarg_parts = [_as_kwargs(m, kwargs) for m, kwargs in enumerate(found.get("kwarg_mbs", [{}] * count))]
        return Presplit(list(zip(arg_parts, kwarg_parts)))

    def given_target(self, target: Any, target_mbs: Iterable[Any] | None, count: int) -> Any:
        """The target of a call, marked as the spec says, or a ``Presplit``. Raises as ``given_inputs``."""
        if target_mbs is None:
            return mark(target, self._target_spec, "target")
        if target is not None:
            raise InvalidArgument("target and target_mbs are both given; give one of them")
        return Presplit(_listed("target_mbs", target_mbs, [count]))

    def rows(self, inputs: Whole | Presplit) -> int:
        """The rows of a batch: those of the first input that has rows. Raises InvalidArgument if none has."""
        if isinstance(inputs, Presplit):
            return sum(self._lengths_of_parts(inputs.parts))
        if len(inputs.args) == 1 and not inputs.kwargs and self._is_plain(inputs.args[0]):
            return inputs.args[0].shape[self.batch_dim]
        return self._named_rows(_leaves(inputs))[1]

    def cut_inputs(self, inputs: Whole | Presplit, count: int) -> Cut:
        """The microbatches of a batch. Raises InvalidArgument for an input that cannot be cut."""
        if isinstance(inputs, Presplit):
            return Cut(inputs.parts, self._lengths_of_parts(inputs.parts))
        if len(inputs.args) == 1 and not inputs.kwargs and self._is_plain(inputs.args[0]):
            (tensor,) = inputs.args
            cut_at = lengths(tensor.shape[self.batch_dim], count)
            return Cut([((part,), {}) for part in _parts(tensor, count, self.batch_dim)], cut_at)
        found = _leaves(inputs)
        first, rows = self._named_rows(found)
        cut_at = lengths(rows, count)
        columns = [self._column(name, leaf, cut_at, first) for name, leaf in found]
        spec = _flattened((inputs.args, inputs.kwargs))[1]
        self._look_for_chance(found, spec, first, rows, count)
        parts = [pytree.tree_unflatten([column[m] for column in columns], spec) for m in range(count)]
        return Cut([tuple(part) for part in parts], cut_at)

    def cut_target(self, target: Any, rows: int | None, count: int) -> list[Any] | None:
        """The targets of each microbatch; ``rows`` of the batch: None takes those of the first tensor."""
        if target is None:
            return None
        if isinstance(target, Presplit):
            return target.parts
        if self._is_plain(target) and rows in (None, target.shape[self.batch_dim]):
            return list(_parts(target, count, self.batch_dim))
        flat, spec = _flattened(target)
        found = [(f"target{pytree.keystr(path)}", leaf) for path, leaf in flat]
        if rows is None:
            rows = self._first_rows(leaf for _, leaf in found)
        cut_at = lengths(rows, count) if rows is not None else [0] * count
        columns = [self._column(name, leaf, cut_at, None) for name, leaf in found]
        return [pytree.tree_unflatten([column[m] for column in columns], spec) for m in range(count)]

    def target_rows(self, target: Any) -> int | None:
        """The rows of a whole target; None if it has none, or was cut by the caller."""
        if target is None or isinstance(target, Presplit):
            return None
        return self._first_rows(leaf for _, leaf in _flattened(target)[0])

    def _is_plain(self, value: Any) -> bool:
        return isinstance(value, Tensor) and value.dim() > self.batch_dim and not value.is_nested

    def _rows_of(self, leaf: Any) -> int | None:
        """The rows of a value that has some; None if it goes whole to every microbatch, or may do so."""
        if isinstance(leaf, Marked):
            if not isinstance(leaf.spec, Rows):
                return None
            sizes = (_length(part, leaf.spec.dim) for part in _parts_with_rows(leaf.value))
            return next((size for size in sizes if size is not None), None)
        if isinstance(leaf, Tensor):
            return _length(leaf, self.batch_dim)
        return None

    def _first_rows(self, leaves: Iterable[Any]) -> int | None:
        """The rows of the first value that has some; None if none has."""
        return next((rows for leaf in leaves if (rows := self._rows_of(leaf)) is not None), None)

    def _named_rows(self, leaves: list[tuple[str, Any]]) -> tuple[str, int]:
        for name, leaf in leaves:
            rows = self._rows_of(leaf)
            if rows is not None:
                return name, rows
        for name, leaf in leaves:
            if not isinstance(leaf, (Marked, Tensor)):
                _check_goes_whole(name, leaf, rows=0)
        raise InvalidArgument(
            "no input tensor has a batch dimension; give at least one tensor of "
            + ("one dimension or more" if self.batch_dim == 0 else f"more than {self.batch_dim} dimensions")
            + " (torch.as_tensor makes a tensor of another library's array)"
        )

    def _lengths_of_parts(self, parts: list[Any]) -> list[int]:
        """The rows of microbatches that the caller cut; 1 for one without tensors."""
        found = [self._first_rows(leaf for _, leaf in _flattened(part)[0]) for part in parts]
        return [1 if rows is None else rows for rows in found]

    def _column(self, name: str, leaf: Any, cut_at: list[int], first: str | None) -> Sequence[Any]:
        """One input's part of each microbatch; ``first``: the input that says how many rows there are."""
        count, rows = len(cut_at), sum(cut_at)
        if isinstance(leaf, Marked):
            if isinstance(leaf.spec, Rows):
                return _cut_as_said(name, leaf.value, leaf.spec.dim, cut_at)
            return [leaf.value] * count
        if isinstance(leaf, Tensor):
            if leaf.dim() == 0:
                return [leaf] * count
            if leaf.is_nested:
                _check_rows(name, leaf.shape[0], rows, first)
                return cut_nested(leaf, cut_at)
            if leaf.dim() <= self.batch_dim:
                raise InvalidArgument(
                    f"{name} has {leaf.dim()} dimensions, so no dimension {self.batch_dim} with the batch "
                    f"(batch_dim); {_say('..., dim=...')}"
                )
            _check_rows(name, leaf.shape[self.batch_dim], rows, first)
            return _parts(leaf, count, self.batch_dim)
        if is_block_mask(leaf):
            of_mask = block_mask_rows(leaf)
            if of_mask is None or count == 1:
                return [leaf] * count
            _check_rows(name, of_mask, rows, first)
            return cut_block_mask(leaf, cut_at)
        if count > 1:
            _check_goes_whole(name, leaf, rows)
        return [leaf] * count

    def _look_for_chance(
        self, leaves: list[tuple[str, Any]], spec: pytree.TreeSpec, first: str, rows: int, count: int
    ) -> None:
        """Looks once at each input that may have as many rows as the batch by chance.

        Raises InvalidArgument if it has, or warns of it if that cannot be found out.
        """
        cut = {name: t for name, t in leaves if isinstance(t, Tensor) and t.dim() > 0 and not t.is_nested}
        if count == 1 or rows == 1 or self.batch_dim != 0 or len(cut) == 1:
            return
        doubts = Doubts.about(cut, self._known, first, has_single_rows=rows // count == 1)
        remaining = set(doubts.doubtful)
        if doubts and self._trial is not None:
            # A single row would fit by broadcasting, and two of two are all.
            cut_at = lengths(rows, min(count, (rows + 1) // 2) if rows > 2 else 1)

            def part(name: str, leaf: Any) -> Any:
                found = self._column(name, leaf, cut_at, first)[0]
                return torch.cat([found, found[:1]]) if rows == 2 and name in cut else found

            def part_with(names: Collection[str]) -> Arguments:
                parts = [leaf if name in names else part(name, leaf) for name, leaf in leaves]
                return tuple(pytree.tree_unflatten(parts, spec))

            remaining = doubts.settle(part_with, self._trial, _say())
        self._known |= set(cut)
        for name in sorted(remaining):
            warnings.warn(
                f"{name}, of shape {list(cut[name].shape)}, is cut into microbatches because it has as many "
                f"rows as the batch; if that is chance, training is wrong. To end this warning, {_say()}",
                stacklevel=4,
            )


def lengths(rows: int, count: int) -> list[int]:
    """Rows of each microbatch: the first ``rows % count`` have one more than the others."""
    base, extra = divmod(rows, count)
    return [base + (m < extra) for m in range(count)]


def _stops(value: Any) -> bool:
    """Whether a value is cut, or refused, as one: marked values, block masks, and lists without tensors."""
    if isinstance(value, Marked) or is_block_mask(value):
        return True
    return type(value) in (list, tuple) and value and not _holds_any(value)


def _holds_any(value: list | tuple) -> bool:
    return any(
        isinstance(leaf, (Tensor, Marked)) or is_block_mask(leaf) or not _is_simple(leaf)
        for leaf in pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Marked))
    )


def _is_simple(leaf: Any) -> bool:
    return isinstance(leaf, (str, bytes, int, float, complex, bool, type(None)))


def _flattened(value: Any) -> tuple[list[tuple[Any, Any]], pytree.TreeSpec]:
    return pytree.tree_flatten_with_path(value, is_leaf=_stops)


def _leaves(inputs: Whole) -> list[tuple[str, Any]]:
    """The inputs with their names in messages."""
    return [(input_name(path), leaf) for path, leaf in _flattened((inputs.args, inputs.kwargs))[0]]


def input_name(path: tuple) -> str:
    """An input's name in messages; ``path`` leads to it from the pair of positional and keyword arguments."""
    kind, *rest = path
    return f"input {'keyword ' if kind.idx == 1 else ''}{pytree.keystr(tuple(rest))}"


def _parts(tensor: Tensor, count: int, dim: int) -> Sequence[Tensor]:
    parts = tensor.tensor_split(count, dim)
    return parts if tensor.requires_grad else [part.data for part in parts]


def _parts_with_rows(value: Any) -> list[Any]:
    """The tensors and lists in a value that was marked as having rows."""
    return pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, (list, tuple)))


def _length(value: Any, dim: int) -> int | None:
    if isinstance(value, Tensor):
        if value.is_nested:
            return value.shape[0]
        return value.shape[dim] if -value.dim() <= dim < value.dim() else None
    return len(value) if isinstance(value, (list, tuple)) else None


def _cut_as_said(name: str, value: Any, dim: int, cut_at: list[int]) -> Sequence[Any]:
    """The parts of a value that was marked as having rows."""
    flat, spec = pytree.tree_flatten(value, is_leaf=lambda v: isinstance(v, (list, tuple)))
    columns: list[Sequence[Any]] = []
    for leaf in flat:
        length = _length(leaf, dim)
        if length is None:
            raise InvalidArgument(
                f"{name} is marked as having rows along dimension {dim}, but holds "
                + (f"a tensor of shape {list(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf))
                + "; give tensors with that dimension, or lists with one entry for each sample"
            )
        _check_rows(name, length, sum(cut_at), None)
        if isinstance(leaf, Tensor):
            columns.append(cut_nested(leaf, cut_at) if leaf.is_nested else _parts(leaf, len(cut_at), dim))
        else:
            ends = itertools.accumulate(cut_at)
            columns.append([leaf[end - length : end] for end, length in zip(ends, cut_at, strict=True)])
    return [pytree.tree_unflatten([column[m] for column in columns], spec) for m in range(len(cut_at))]


def _check_rows(name: str, found: int, rows: int, first: str | None) -> None:
    if found == rows:
        return
    where = f"{name} has {found} rows where the batch has {rows}"
    if first is not None:
        where = f"{first} has {rows} rows and {name} has {found}"
    raise InvalidArgument(
        f"{where}; a value that is not marked has one row for each sample in the batch's dimension; "
        f"{_say('..., dim=...')}"
    )


def _check_goes_whole(name: str, leaf: Any, rows: int) -> None:
    """Refuses a value that no microbatch can do with as a whole, or perhaps not."""
    if type(leaf) is list and len(leaf) == rows > 1:
        raise InvalidArgument(
            f"{name} is a list with as many entries as the batch has rows; {_say(entry='entry')}"
        )
    if hasattr(leaf, "__array__"):
        raise InvalidArgument(
            f"{name} is a {type(leaf).__module__}.{type(leaf).__name__}; give a tensor "
            "(torch.as_tensor makes one of it)"
        )
    if next(held_tensors(leaf), None) is not None:
        raise InvalidArgument(
            f"{name} is a {type(leaf).__name__}, which holds tensors that torch's pytrees do not see, so it "
            f"cannot be cut into microbatches; {how_to_open(leaf)}, or pipeline_ext.whole(...) around it if "
            "every microbatch takes all of it"
        )


def _listed(name: str, given: Iterable[Any], counts: Sequence[int]) -> list[Any]:
    if isinstance(given, (Tensor, dict, str)) or not isinstance(given, Iterable):
        raise InvalidArgument(
            f"{name} is a {type(given).__name__}; give a list with an entry for each microbatch"
        )
    found = list(given)
    if len(found) not in counts:
        accepted = f"{counts[0]}" if len(counts) == 1 else f"1 to {counts[-1]}"
        raise InvalidArgument(f"{name} has {len(found)} microbatches; the pipeline takes {accepted}")
    return found


def _as_args(m: int, args: Any) -> tuple:
    if isinstance(args, Tensor):
        return (args,)
    if not isinstance(args, tuple):
        raise InvalidArgument(
            f"arg_mbs[{m}] is a {type(args).__name__}; give the tuple of the microbatch's positional arguments"
        )
    return args


def _as_kwargs(m: int, kwargs: Any) -> dict[str, Any]:
    if not isinstance(kwargs, dict):
        raise InvalidArgument(
            f"kwarg_mbs[{m}] is a {type(kwargs).__name__}; give the dict of the microbatch's keyword arguments"
        )
    return kwargs
