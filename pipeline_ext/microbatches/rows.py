"""How a caller says which values of a batch have a row for each sample, and along which dimension."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from torch.utils import _pytree as pytree

from ..base.imported import imported_class
from ..errors import InvalidArgument

_TORCH = "torch.distributed.pipelining.microbatch"
_NOT_GIVEN: Any = object()
_HOW = (
    "give pipeline_ext.rows(dim=...), pipeline_ext.whole(), torch's TensorChunkSpec or _Replicate, or a tuple, "
    "list or dict of these that follows the value's structure; None leaves a value to the rules for unmarked "
    "ones"
)


class Rows(NamedTuple):
    """A value with one row for each sample: a tensor along ``dim``, a list or tuple along its entries."""

    dim: int = 0


class Whole(NamedTuple):
    """A value that goes unchanged to every microbatch."""


Spec = Rows | Whole


class Marked:
    """A value, and how it is cut. To torch's pytrees it is a node with the value inside."""

    __slots__ = ("spec", "value")

    def __init__(self, value: Any, spec: Spec) -> None:
        self.value = value
        self.spec = spec

    @classmethod
    def _unflatten(cls, children: Any, spec: Any) -> Self:
        (value,) = children
        return cls(value, spec)


pytree.register_pytree_node(Marked, lambda marked: ([marked.value], marked.spec), Marked._unflatten)


def whole(value: Any = _NOT_GIVEN) -> Any:
    """Marks an input or target that goes unchanged to every microbatch, as a mask [S, S] does.

    ``pipe.step(x, mask=whole(mask))`` holds for one call. Without a value it is a spec for
    ``Pipeline(args_spec=..., kwargs_spec=..., target_spec=...)``.
    """
    return Whole() if value is _NOT_GIVEN else Marked(value, Whole())


def rows(value: Any = _NOT_GIVEN, dim: int = 0) -> Any:
    """Marks an input or target that has one row for each of the batch's samples.

    A tensor is cut along ``dim``. A list or tuple is cut along its entries, one for each sample; they may be
    anything. In a dict, each value is cut like this. ``pipe.step(images=rows(images))`` holds for one call.
    Without a value it is a spec for ``Pipeline(args_spec=..., kwargs_spec=..., target_spec=...)``.

    Raises InvalidArgument if ``dim`` is not a whole number.
    """
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise InvalidArgument(f"dim is {dim!r}; give the number of the dimension that holds the rows")
    return Rows(dim) if value is _NOT_GIVEN else Marked(value, Rows(dim))


def check_spec(name: str, spec: Any) -> Any:
    """``spec`` with torch's specs replaced by ours. Raises InvalidArgument for what is no spec."""
    if spec is None or isinstance(spec, Spec):
        return spec
    if isinstance(spec, imported_class(_TORCH, "TensorChunkSpec")):
        return Rows(spec.split_dim)
    replicate = imported_class(_TORCH, "_Replicate")
    if replicate and (spec is replicate or isinstance(spec, replicate)):
        return Whole()
    if isinstance(spec, Mapping):
        return {key: check_spec(f"{name}[{key!r}]", value) for key, value in spec.items()}
    if isinstance(spec, (tuple, list)):
        return tuple(check_spec(f"{name}[{index}]", value) for index, value in enumerate(spec))
    raise InvalidArgument(f"{name} is {spec!r}; {_HOW}")


def mark_inputs(
    args: tuple, kwargs: dict[str, Any], args_spec: Any, kwargs_spec: Any
) -> tuple[tuple, dict[str, Any]]:
    """The inputs of a call, marked as the specs say. A call may leave out arguments that a spec describes.

    Raises InvalidArgument for a spec that does not fit its argument.
    """
    if args_spec is not None:
        specs = [args_spec] * len(args) if isinstance(args_spec, Spec) else args_spec
        marked = [mark(v, s, f"input [{i}]") for i, (v, s) in enumerate(zip(args, specs))]
        args = (*marked, *args[len(marked) :])
    if kwargs_spec is not None:
        of = dict.fromkeys(kwargs, kwargs_spec) if isinstance(kwargs_spec, Spec) else kwargs_spec
        kwargs = {key: mark(v, of.get(key), f"input keyword [{key!r}]") for key, v in kwargs.items()}
    return args, kwargs


def mark(value: Any, spec: Any, name: str) -> Any:
    """``value`` with the parts that ``spec`` describes marked; a mark that the caller made stays.

    ``spec`` is a result of ``check_spec``. Raises InvalidArgument if it does not fit the value.
    """
    if spec is None or isinstance(value, Marked):
        return value
    if isinstance(spec, Spec):
        return Marked(value, spec)
    if isinstance(spec, dict):
        if not isinstance(value, Mapping):
            raise InvalidArgument(f"the spec of {name} is a dict, but {name} is a {type(value).__name__}")
        unknown = [key for key in spec if key not in value]
        if unknown:
            raise InvalidArgument(f"the spec of {name} names {unknown}, but {name} has only {[*value]}")
        return {key: mark(v, spec.get(key), f"{name}[{key!r}]") for key, v in value.items()}
    if not isinstance(value, (tuple, list)) or len(value) != len(spec):
        given = f"has {len(value)}" if isinstance(value, (tuple, list)) else f"is a {type(value).__name__}"
        raise InvalidArgument(f"the spec of {name} has {len(spec)} entries, but {name} {given}")
    marked = [mark(v, s, f"{name}[{i}]") for i, (v, s) in enumerate(zip(value, spec, strict=True))]
    return type(value)(*marked) if hasattr(value, "_fields") else type(value)(marked)


def unmarked(value: Any) -> Any:
    """``value`` as the caller has it, without ``rows`` and ``whole``."""
    return pytree.tree_map(
        lambda v: v.value if isinstance(v, Marked) else v, value, is_leaf=lambda v: isinstance(v, Marked)
    )
