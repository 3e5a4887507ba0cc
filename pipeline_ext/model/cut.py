"""Cutting a model into stages of consecutive layers."""

import copy
import difflib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from ..errors import InvalidArgument
from .containers import is_list_of_stages, only_runs_children
from .skips import Scope
from .slice import Slice

_LIST_FORM = (
    "give a list of stage modules instead, each of which takes what the one before returns: "
    "Pipeline([embedding, nn.Sequential(*blocks), head], microbatches=8, ...)"
)


def cut(
    model: nn.Module | Sequence[nn.Module],
    num_stages: int | None,
    *,
    cuts: Sequence[str | int] | None = None,
    balance: str = "parameters",
    sample: Any = None,
) -> list[nn.Module | Callable[[], nn.Module]]:
    """The stage modules of a model.

    Args:
        model: an ``nn.Sequential`` that does nothing but run its layers; or a list of stage modules, or of
            functions that make them. Layers of nested sequentials of that kind count one by one.
        num_stages: number of stages; may be left out if ``model`` or ``cuts`` tell it.
        cuts: the layers, by name or position, at which a new stage begins.
        balance: ``"parameters"``: the largest stage has as few parameters as possible. ``"time"``: the slowest
            stage takes as little time as possible for forward and backward of ``sample``, which is measured.
        sample: one microbatch's input: a tensor, or a tuple of positional arguments.

    Raises:
        InvalidArgument: if the model cannot be cut like this. The message says how it can.
    """
    if is_list_of_stages(model):
        return _given_stages(model, num_stages, cuts)
    if not isinstance(model, nn.Module):
        raise InvalidArgument(
            f"model is a {type(model).__name__}; give an nn.Module, or a list of stage modules"
        )
    layers = _open(model)
    if not layers:
        raise InvalidArgument(f"{type(model).__name__} has no child modules to cut; {_LIST_FORM}")
    if cuts is not None:
        starts = starts_of(cuts, [name for name, _ in layers], num_stages, "layer")
    else:
        starts = _balanced_starts(layers, num_stages, balance, sample)
    ends = [*starts[1:], len(layers)]
    return [Slice(layers[start:end]) for start, end in zip(starts, ends)]


def balanced(weights: Sequence[float], parts: int) -> list[int]:
    """The starts of ``parts`` consecutive runs of the weights, the heaviest of them as light as possible."""
    sums = [0.0]
    for weight in weights:
        sums.append(sums[-1] + weight)
    count = len(weights)
    # best[i]: for the first i weights, the weight of the heaviest run, and where the last run starts.
    best = [(sums[i], 0) for i in range(count + 1)]
    history = [best]
    for part in range(2, parts + 1):
        best = [
            min(
                ((max(history[-1][j][0], sums[i] - sums[j]), j) for j in range(part - 1, i)),
                default=(float("inf"), 0),
            )
            for i in range(count + 1)
        ]
        history.append(best)
    starts, end = [], count
    for best in reversed(history):
        end = best[end][1]
        starts.append(end)
    return starts[::-1]


def _given_stages(
    stages: Sequence[Any] | nn.ModuleList, num_stages: int | None, cuts: Sequence[str | int] | None
) -> list[nn.Module | Callable[[], nn.Module]]:
    if cuts is not None:
        raise InvalidArgument("cuts does not go with a list of stage modules, which is cut already")
    if not stages or not all(isinstance(s, nn.Module) or _is_maker(s) for s in stages):
        raise InvalidArgument(
            "a list of stages holds one nn.Module or more, or functions that make them, and nothing else"
        )
    if num_stages is not None and num_stages != len(stages):
        raise InvalidArgument(
            f"num_stages is {num_stages} but the list holds {len(stages)} stage modules; leave "
            "num_stages out, or make them agree"
        )
    return list(stages)


def _is_maker(stage: Any) -> bool:
    return callable(stage) and not isinstance(stage, type)


def _open(model: nn.Module, prefix: str = "") -> list[tuple[str, nn.Module]]:
    """Layers with their names, those inside plain containers one by one."""
    layers: list[tuple[str, nn.Module]] = []
    for name, child in model._modules.items():  # not children(): a layer that occurs twice runs twice
        if child is None:
            continue
        if only_runs_children(child) and len(child) > 0:
            layers += _open(child, f"{prefix}{name}.")
        else:
            layers.append((prefix + name, child))
    return layers


def starts_of(cuts: Sequence[str | int], names: list[str], num_stages: int | None, kind: str) -> list[int]:
    """Where stages begin. ``names``: of all that could begin one, each a ``kind``: "layer" or "call".

    Raises InvalidArgument for cuts that cannot be, or are not ``num_stages`` less one.
    """
    if not isinstance(cuts, (list, tuple)) or not all(isinstance(c, (str, int)) for c in cuts):
        raise InvalidArgument(
            f"cuts is {cuts!r}; give a list of layer names or positions, as in cuts=[{names[-1]!r}]"
        )
    starts = [0]
    for cut_at in cuts:
        position = _position(cut_at, names, kind)
        if position <= starts[-1]:
            raise InvalidArgument(
                f"cuts must ascend and leave the first stage a {kind}; {cut_at!r} is {kind} {position} "
                f"and the stage before begins at {kind} {starts[-1]}"
            )
        starts.append(position)
    if num_stages is not None and num_stages != len(starts):
        raise InvalidArgument(f"{len(cuts)} cuts make {len(starts)} stages, but num_stages is {num_stages}")
    return starts


def _position(cut_at: str | int, names: list[str], kind: str) -> int:
    if isinstance(cut_at, int):
        if not 0 <= cut_at < len(names):
            raise InvalidArgument(f"there is no {kind} {cut_at}; there are {len(names)}, from 0")
        return cut_at
    for position, name in enumerate(names):
        if name == cut_at or name.startswith(f"{cut_at}."):
            return position
    near = difflib.get_close_matches(cut_at, names[1:] or names, n=1, cutoff=0.0)
    raise InvalidArgument(
        f"there is no {kind} {cut_at!r} to cut at; the nearest name is {near[0]!r}. "
        f"The {kind}s are {', '.join(names)}"
    )


def _balanced_starts(
    layers: Sequence[tuple[str, nn.Module]], num_stages: int | None, balance: str, sample: Any
) -> list[int]:
    if num_stages is None:
        raise InvalidArgument("num_stages is missing: say into how many stages to cut the model")
    if num_stages > len(layers):
        raise InvalidArgument(
            f"the model has {len(layers)} layers and cannot be cut into {num_stages} stages; give "
            f"num_stages of at most {len(layers)}"
        )
    if balance == "parameters":
        weights = _parameter_counts([layer for _, layer in layers])
    elif balance == "time":
        if sample is None:
            raise InvalidArgument('balance="time" runs each layer on one microbatch; give its input as sample=')
        weights = _layer_times([layer for _, layer in layers], sample)
    else:
        raise InvalidArgument(f'balance is {balance!r}; it is "parameters" or "time"')
    return balanced(weights, num_stages)


def _parameter_counts(layers: Sequence[nn.Module]) -> list[float]:
    """Number of parameters of each layer. A shared parameter counts in the first layer that holds it.

    Each layer weighs a little more than that, so that layers without parameters spread evenly.
    """
    if any(isinstance(p, UninitializedParameter) for layer in layers for p in layer.parameters()):
        raise InvalidArgument(
            "the model has lazy parameters, whose size is not known yet; run it once before cutting it"
        )
    seen: set[Tensor] = set()
    counts = []
    for layer in layers:
        new = [p for p in layer.parameters() if p not in seen]
        seen.update(new)
        counts.append(sum(p.numel() for p in new) + 1.0 / len(layers))
    return counts


def _layer_times(layers: Sequence[nn.Module], sample: Any, repeats: int = 3) -> list[float]:
    """Seconds of forward and backward of each layer. Copies run, so the model's state does not change."""
    value = sample if isinstance(sample, tuple) else (sample,)
    times = []
    stashed: dict[str, Tensor] = {}
    with torch.random.fork_rng(devices=[]):
        for layer in layers:
            layer = copy.deepcopy(layer)
            runs = []
            for _ in range(repeats + 1):
                inputs = pytree.tree_map_only(Tensor, _as_input, value)
                scope = Scope({name: _as_input(tensor) for name, tensor in stashed.items()})
                begin = time.perf_counter()
                with scope:
                    result = layer(*inputs)
                outputs = [t for t in pytree.tree_leaves(result) if isinstance(t, Tensor) and t.requires_grad]
                if outputs:
                    torch.autograd.backward(outputs, [torch.ones_like(t) for t in outputs])
                runs.append(time.perf_counter() - begin)
            times.append(statistics.median(runs[1:]))
            value = (pytree.tree_map_only(Tensor, Tensor.detach, result),)
            stashed = scope
    return times


def _as_input(tensor: Tensor) -> Tensor:
    """A copy that layers may write to; it requires a gradient if its type allows that."""
    copied = tensor.detach().clone()
    return copied.requires_grad_().clone() if copied.is_floating_point() else copied
